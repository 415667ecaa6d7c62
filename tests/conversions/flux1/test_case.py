"""The committed reference traces, and the original code beside ours where a checkout is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversions.flux1 import record
from conversions.flux1.case import CASES
from parity.recorder import file_sha256
from parity.trace import Trace
from porter.builtin import locate
from porter.core.errors import BadInputError, MissingError

REFERENCES = os.environ.get("PORTER_REFERENCES")
needs_original = pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with a flux checkout")


@pytest.fixture
def original() -> Path:
    return Path(str(REFERENCES)) / "flux"


@pytest.fixture(scope="module")
def builtin() -> Path:
    found = locate("tiny-flux")
    assert found is not None
    return found


def traces() -> dict[str, Trace]:
    """Those of the embedded model; the others are recorded on drawn weights."""
    return {case.component: Trace.open(case.trace) for case in CASES.components if case.record}


def test_traces_are_small_and_say_where_they_come_from() -> None:
    assert sum(case.trace.stat().st_size for case in CASES.components if case.record) <= 1_000_000
    for trace in traces().values():
        assert trace.meta["reference"]["commit"] == record.COMMIT
        assert trace.meta["reference"]["name"].startswith("flux.")
        assert trace.meta["idle"] == [] and trace.meta["dtype"] == "float32"
        assert not Path(trace.meta["command"].split()[-1]).is_absolute()


def test_traces_belong_to_the_embedded_model(builtin: Path) -> None:
    """Recorded on exactly these files; after training, `python -m conversions.flux1.record` makes new ones."""
    for trace in traces().values():
        source = trace.meta["source"]
        assert file_sha256(builtin / source["file"]) == source["sha256"]
        assert file_sha256(builtin / trace.meta["config"]["file"]) == trace.meta["config"]["sha256"]


def test_traces_hold_every_block_in_full() -> None:
    found = traces()
    for block in (*(f"double_blocks.{i}" for i in range(2)), *(f"single_blocks.{i}" for i in range(4))):
        assert found["transformer"].value(f"forward/{block}#0.out.0").complete
    for name in ("encode/encoder.mid.attn_1", "decode/decoder.mid.block_2", "decode/decoder.up.0.block.1"):
        assert found["vae"].value(f"{name}#0.out.0").complete
    assert set(found["vae"].passes) == {"encode", "decode"}


def test_inputs_leave_nothing_symmetric() -> None:
    """Images, times and guidance differ from one another and both position axes vary, so that exchanges show."""
    inputs = traces()["transformer"].inputs("forward")
    assert not torch.equal(inputs["img"][0], inputs["img"][1])
    assert inputs["timesteps"][0] != inputs["timesteps"][1] and inputs["guidance"][0] != inputs["guidance"][1]
    ids = inputs["img_ids"][0]
    assert len(ids[:, 1].unique()) != len(ids[:, 2].unique()) and len(ids[:, 2].unique()) > 1


def test_not_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="not a checkout") as error:
        record.import_original(tmp_path)
    assert record.COMMIT in str(error.value.hint)


@pytest.mark.reference
@needs_original
def test_the_committed_traces_are_what_the_original_computes(original: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conversions.flux1.record", "--reference-repo", str(original), "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for component, committed in traces().items():
        fresh = Trace.open(tmp_path / f"{component}.safetensors")
        assert list(fresh.events) == list(committed.events)
        for key in committed.events:
            torch.testing.assert_close(fresh.value(key).high, committed.value(key).high, rtol=0, atol=1e-9)


@pytest.mark.reference
@needs_original
@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_the_original_loads_strictly(original: Path, builtin: Path, tmp_path: Path, damage: str) -> None:
    state = load_file(builtin / "ae.safetensors")
    if damage == "missing":
        state.pop("decoder.conv_out.bias")
    else:
        state["decoder.conv_out.scale"] = torch.ones(3)
    save_file(state, tmp_path / "ae.safetensors")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes((builtin / "vae" / "config.json").read_bytes())
    with pytest.raises(BadInputError, match="does not load") as error:
        record.record_component("vae", tmp_path, original, seed=0, samples=0)
    assert "decoder.conv_out" in str(error.value.found)
