"""The native transformer shared by two processes under the real torchrun, on the CPU, equals one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversions.wan.parallel_worker import DTYPES, MODES, VARIANTS
from tests.conversions.wan.ports import PICTURE, transformer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FLOOR = 1e-14


def test_every_way_of_sharing_equals_one_process_up_to_rounding(tmp_path: Path) -> None:
    """Tensor parallel with norms over all heads, sequence parallel with a time for each patch, texts' keys kept."""
    for variant in VARIANTS:
        changes = PICTURE | {"added_kv_proj_dim": 48, "pos_embed_seq_len": 10} if variant == "flf2v" else {}
        transformer(num_attention_heads=4, **changes).save_pretrained(tmp_path / variant)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, "-m", "tests.conversions.wan.parallel_worker", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    gaps = json.loads((tmp_path / "results.json").read_text())
    assert len(gaps) == len(MODES) * len(VARIANTS) * len(DTYPES)
    for mode in MODES:
        for variant in VARIANTS:
            single, double = (gaps[f"{mode}: {variant} {dtype}"] for dtype in DTYPES)
            assert single < 5e-6 and double <= max(single / 1000, FLOOR), (mode, variant, single, double)
