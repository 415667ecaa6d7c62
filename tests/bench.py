"""`make bench`: measurements as ratios against their peers, all within one run on this machine.

    python -m tests.bench [--gigabytes 4] [--whole]

Prints a table and writes reports/bench/cpu.json. Each figure is the median of several runs, taken in turn (A B A B …),
with the source dropped from the page cache before every run where the system lets us.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from conversions.flux1.recipe import TRANSFORMER, original_headers
from porter.core.checkpoint import TensorInfo, read_header
from porter.core.recipe import compile_recipe
from tests.sparse_models import flux_file, flux_folder

RUNS, SLOW_RUNS = 5, 3
WIDTH = {  # FLUX.1's real width; the number of blocks sets the size
    "patch_size": 1, "in_channels": 64, "out_channels": None, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


def write_checkpoint(path: Path, header: dict[str, TensorInfo]) -> int:
    """A bfloat16 file with random content under these names -> its size in bytes."""
    entries: dict[str, Any] = {}
    at = 0
    for name, info in header.items():
        entries[name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    head = json.dumps(entries).encode()
    noise = np.random.default_rng(0).integers(0, 2**15, 1 << 22, dtype=np.uint16).tobytes()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, at, len(noise)):
            file.write(noise[: min(len(noise), at - start)])
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that every run reads it from the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], prepare: Callable[[], None] | None = None) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process; with the disk's part where something is prepared."""
    if prepare:
        prepare()
    began = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if prepare:
            os.sync()
        seconds = time.monotonic() - began
        if status:
            complaints.seek(0)
            sys.exit(f"{' '.join(command)}\n{complaints.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


DIFFUSERS = """
import sys, torch
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_single_file(sys.argv[1], config=sys.argv[2], torch_dtype=torch.bfloat16)
model.save_pretrained(sys.argv[3], max_shard_size="100GB")
"""


def conversion(folder: Path, gigabytes: float, *, whole: bool = False) -> dict[str, Any]:
    """porter convert against `cp`, its casts against `cp`, and diffusers' own single-file loader against it.

    What ran before decides how fast the page cache gets memory, and so the time of `cp`: each group has its own.
    """
    blocks = max(1, round(gigabytes / 0.9))
    double, single = (19, 38) if whole else (blocks, blocks)
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": double, "num_single_layers": single, **WIDTH}
    source, settings = folder / "flux1-bench.safetensors", folder / "transformer" / "config.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(config))
    size = write_checkpoint(source, original_headers(config, "BF16"))
    out, copy, theirs = folder / "port", folder / "copy.safetensors", folder / "theirs"

    def clean() -> None:
        for path in (out, theirs):
            shutil.rmtree(path, ignore_errors=True)
        copy.unlink(missing_ok=True)
        os.sync()
        forget(source)

    porter = [str(Path(sys.executable).with_name("porter")), "convert", str(source), "--config", str(settings)]
    ours, cp = [*porter, "-o", str(out), "--quiet"], ["cp", str(source), str(copy)]
    groups = {"copied": (SLOW_RUNS if whole else RUNS, {"cp": cp, "porter convert": ours})}
    if not whole:  # at FLUX.1-dev's size the others take too long, or too much memory
        casts = {f"porter convert --dtype {name}": [*ours, "--dtype", name] for name in ("float16", "float32")}
        command = [sys.executable, "-W", "ignore", "-c", DIFFUSERS, str(source), str(settings.parent), str(theirs)]
        groups["cast"] = (RUNS, {"cp": cp, **casts})
        groups["beside diffusers"] = (
            SLOW_RUNS, {"porter convert": ours, "diffusers from_single_file + save_pretrained": command}
        )  # fmt: skip
    found = {}
    for name, (runs, commands) in groups.items():
        taken: dict[str, list[tuple[float, float]]] = {label: [] for label in commands}
        for _ in range(runs):
            for label, command in commands.items():
                taken[label].append(timed(command, clean))
        found[name] = table(f"conversion, {name}", f"{size / 1e9:.2f} GB bf16, {double} + {single} blocks", taken)
    clean()
    return found


def compiling(folder: Path) -> dict[str, Any]:
    """Reading FLUX.1-dev's header and compiling the plan for its 780 tensors, in one process."""
    source = flux_file(folder / "flux1-dev-sparse.safetensors")
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        header, _ = read_header(source)
        config = TRANSFORMER.infer_config(header, {"axes_dims_rope": [16, 56, 56]})
        plan = compile_recipe(TRANSFORMER, config, header)
        seconds.append(round(time.perf_counter() - began, 3))
        assert len(plan.targets) == 1160
    print(f"\nFLUX.1-dev's plan compiled in {statistics.median(seconds):.3f} s")
    return {
        "what": "FLUX.1-dev's header read and its plan compiled, without the start of the process",
        "seconds": seconds,
    }


def startup(folder: Path) -> dict[str, Any]:
    """porter's start and plans against bare Python, its two libraries for the terminal, and an import of torch."""
    porter = str(Path(sys.executable).with_name("porter"))
    single, whole = flux_file(folder / "flux1-dev.safetensors"), flux_folder(folder / "FLUX.1-dev")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import click, rich'": [sys.executable, "-c", "import click, rich"],
        "porter --help": [porter, "--help"],
        "porter plan builtin:tiny-flux": [porter, "plan", "builtin:tiny-flux"],
        "porter plan FOLDER (33.7 GB, sparse)": [porter, "plan", str(whole)],
        "porter plan FILE (23.8 GB, sparse)": [porter, "plan", str(single)],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(RUNS + 2):
        for name, command in commands.items():
            taken[name].append(timed(command))
    return table("start-up and plans", "warm", taken, "python -c 'import click, rich'")


def table(
    title: str, what: str, taken: dict[str, list[tuple[float, float]]], peer: str | None = None
) -> dict[str, Any]:
    """Print medians and ratios to `peer`, by default the first; the same as data."""
    peer = peer or next(iter(taken))
    median = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in taken.items()}
    print(f"\n{title} ({what})\n{'':48}{'seconds':>9}{'ratio':>8}{'peak MB':>9}")
    rows = {}
    for name, runs in taken.items():
        peak = max(megabytes for _, megabytes in runs)
        ratio = median[name] / median[peer]
        print(f"{name:48}{median[name]:9.2f}{ratio:8.2f}{peak:9.0f}")
        seconds = [round(s, 3) for s, _ in runs]
        rows[name] = {"seconds": seconds, "ratio": round(ratio, 3), "peak_megabytes": round(peak)}
        if name.endswith("float32"):
            rows[name]["ratio_by_bytes_written"] = round(ratio / 2, 3)
            print(f"{'  by bytes written':48}{'':9}{ratio / 2:8.2f}")
    return {"what": what, "peer": peer, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the file to convert")
    parser.add_argument("--whole", action="store_true", help="also FLUX.1-dev's 23.8 GB (needs 50 GB of disk)")
    parser.add_argument("--out", type=Path, default=Path("reports/bench/cpu.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="porter-bench-", dir=Path.cwd()) as folder:
        place = Path(folder)
        results = {"start-up": startup(place), "compiling": compiling(place)}
        for name, whole in (("conversion", False), ("conversion at full size", True)):
            if not whole or options.whole:
                inside = place / name.replace(" ", "-")
                inside.mkdir()
                results[name] = conversion(inside, options.gigabytes, whole=whole)
                shutil.rmtree(inside)
    environment = {
        "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "safetensors")},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": "make bench", "environment": environment, **results}
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
