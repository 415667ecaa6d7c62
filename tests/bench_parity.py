"""`make bench-parity`: what it costs to trace FLUX.1's transformer block by block, at its real width.

    python -m tests.bench_parity [--blocks 2] [--runs 5]

Runs one forward of a few double and single blocks with 512 text and 256 image tokens plain, and traced at block level:
what every block takes and answers is written to disk, as `parity.scale` does it (float32, dtypes noted), and as
`parity.recorder` records it (kept in memory, then saved). In turn, with the weights in memory throughout, so that
drawing them is not counted. Prints medians and writes reports/bench/parity-tracing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversions.flux1.scale import DEV, case
from parity.blockwise import Side, arguments
from parity.hollow import Streamed
from parity.ondemand import drawn
from parity.recorder import Watch, record
from parity.reference import blocks_of
from parity.shelf import Shelf

MOST = 1.3  # what tracing may cost, as a multiple of the plain forward


def streamed(module: nn.Module, call: Any, inputs: Any, folder: Path) -> None:
    """One float32 run whose blocks' inputs and answers go to disk as they come."""
    side = Side(Streamed(module, blocks_of(module), (), lambda names: ()), call, (), Shelf(folder), 0)

    def around(path: str, number: int, run: Any, args: Any, kwargs: Any) -> Any:
        where = f"{path}#{number}"
        side.keep(where, "in", arguments(side.module.get_submodule(path), args, kwargs))
        out = run(*args, **kwargs)
        side.keep(where, "out", out)
        return out

    side.run(inputs, around, {})


def recorded(module: nn.Module, call: Any, inputs: Any, folder: Path) -> None:
    """The recorder's float32 run, saved."""
    watch = Watch("|".join(path.replace(".", r"\.") for path in blocks_of(module)))
    record(module, {"forward": (call, inputs)}, [watch], {}, double=False).save(folder / "trace.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_parity")
    parser.add_argument("--blocks", type=int, default=2, help="double blocks, and as many single ones")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("reports/bench/parity-tracing.json"))
    options = parser.parse_args()
    flux = case("diffusers", "native", {**DEV, "num_layers": options.blocks, "num_single_layers": options.blocks})
    side, inputs = flux.candidate, flux.inputs_of(0)["forward"]
    module = side.build(flux.config).eval()
    module.load_state_dict(
        {name: drawn(name, tuple(t.shape), 0) for name, t in module.state_dict().items()}, assign=True
    )
    call = side.passes["forward"]
    ways: dict[str, Callable[[Path], Any]] = {
        "plain forward": lambda folder: call(module, inputs),
        "traced block by block, streamed to disk": lambda folder: streamed(module, call, inputs, folder),
        "traced by the recorder, saved": lambda folder: recorded(module, call, inputs, folder),
    }
    disk = Path("build")  # where a folder for temporary files may be memory
    disk.mkdir(exist_ok=True)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(options.runs + 1):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory(dir=disk) as folder:
                    began, used = time.monotonic(), cpu()
                    way(Path(folder))
                    if turn:  # the first warms up
                        taken[name].append((time.monotonic() - began, cpu() - used))
    rows: dict[str, Any] = {}
    plain = taken["plain forward"]
    for name, found in taken.items():
        seconds, busy = ([round(run[i], 3) for run in found] for i in (0, 1))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found, plain, strict=True))
        work = statistics.median(busy) / statistics.median(b for _, b in plain)
        rows[name] = {"seconds": seconds, "cpu_seconds": busy, "ratio": round(ratio, 3), "cpu_ratio": round(work, 3)}
        print(f"{name:44}{statistics.median(seconds):8.2f} s{ratio:8.2f}x, processor time {work:.2f}x")
    document = {
        "command": f"python -m tests.bench_parity --blocks {options.blocks} --runs {options.runs}",
        "what": f"{options.blocks} double, {options.blocks} single blocks, width 3072, 512 text and 256 image tokens",
        "most": MOST,
        "environment": {
            "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers")},
        },
        "runs": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"wrote {options.out}")


def cpu() -> float:
    """Seconds of processor time so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
