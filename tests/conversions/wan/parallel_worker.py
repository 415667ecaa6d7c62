"""What each process of the test's job runs: every way of sharing against one process, in float32 and float64.

    python -m torch.distributed.run … -m tests.conversions.wan.parallel_worker FOLDER

FOLDER holds a transformer for each of `VARIANTS`; rank 0 writes `results.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversions.wan.model import TextCache, WanTransformer
from runtime.loader import load_module
from runtime.parallel.guidance import predict
from runtime.parallel.mesh import Parallel, start

VARIANTS = ("t2v", "flf2v", "ti2v")
MODES = (Parallel(tp=2), Parallel(ulysses=2), Parallel(ring=2), Parallel(cfg=2))
DTYPES = (torch.float32, torch.float64)


def passes(variant: str, config: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Two videos of 3 x 3 x 5 patches, which two ranks share unevenly, with two texts."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    times = torch.tensor([937.0, 12.5])
    common = {"hidden_states": random(2, config["in_channels"], 3, 6, 10)}
    common["timestep"] = times[:, None] * torch.linspace(0, 1, 45) if variant == "ti2v" else times
    if config["image_dim"] is not None:
        common["encoder_hidden_states_image"] = random(4, config["pos_embed_seq_len"] // 2, config["image_dim"])
    return [common | {"encoder_hidden_states": random(2, words, config["text_dim"])} for words in (7, 9)]


@torch.no_grad()
def answers(folder: Path) -> dict[str, list[Tensor]]:
    """Variant and dtype -> both passes, twice: the second time with the texts' keys that the first left."""
    found = {}
    for variant in VARIANTS:
        config = json.loads((folder / variant / "config.json").read_text())
        for dtype in DTYPES:
            model = load_module(WanTransformer, config, folder / variant, dtype=dtype, device=torch.device("cpu"))
            given = [each | {"cache": TextCache()} for each in passes(variant, config, dtype)]
            found[f"{variant} {dtype}"] = [*predict(model, given), *predict(model, given)]
    return found


def main(folder: Path) -> None:
    expected, results = answers(folder), {}
    for mode in MODES:
        with start(mode, "cpu") as run:
            for name, tensors in answers(folder).items():
                gaps = [
                    float((x - y).abs().max() / y.abs().max()) for x, y in zip(tensors, expected[name], strict=True)
                ]
                worst = torch.tensor(max(gaps), dtype=torch.float64)
                torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
                results[f"{mode}: {name}"] = float(worst)
            if run.main:
                (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
