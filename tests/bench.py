"""`make bench`: measurements as ratios against their peers, all within one run on this machine.

    python -m tests.bench [--gigabytes 2]

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

from conversions.flux1.recipe import original_headers
from porter.core.checkpoint import TensorInfo
from tests.sparse_models import flux_file, flux_folder

RUNS = 3
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


def timed(command: list[str], prepare: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process, the disk's part included."""
    prepare()
    began = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
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


def conversion(folder: Path, gigabytes: float) -> dict[str, Any]:
    """porter convert against `cp` and diffusers' own single-file loader, on one FLUX.1-wide file."""
    blocks = max(1, round(gigabytes / 0.9))
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": blocks, "num_single_layers": blocks, **WIDTH}
    source, settings = folder / "flux1-bench.safetensors", folder / "transformer" / "config.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(config))
    size = write_checkpoint(source, original_headers(config, "BF16"))
    out, copy, theirs = folder / "port", folder / "copy.safetensors", folder / "theirs"

    def clean() -> None:
        for path in (out, theirs):
            shutil.rmtree(path, ignore_errors=True)
        copy.unlink(missing_ok=True)
        forget(source)

    porter = str(Path(sys.executable).with_name("porter"))
    commands = {
        "cp": ["cp", str(source), str(copy)],
        "porter convert": [porter, "convert", str(source), "--config", str(settings), "-o", str(out), "--quiet"],
        "diffusers from_single_file + save_pretrained": [
            sys.executable, "-W", "ignore", "-c", DIFFUSERS, str(source), str(settings.parent), str(theirs)],
    }  # fmt: skip
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            taken[name].append(timed(command, clean))
    clean()
    return table("conversion", f"{size / 1e9:.2f} GB bf16, {blocks} + {blocks} blocks", "cp", taken)


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
            taken[name].append(timed(command, lambda: None))
    return table("start-up and plans", "warm", "python -c 'import click, rich'", taken)


def table(title: str, what: str, peer: str, taken: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Print medians and ratios to `peer`; the same as data."""
    median = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in taken.items()}
    print(f"\n{title} ({what})\n{'':48}{'seconds':>9}{'ratio':>8}{'peak MB':>9}")
    rows = {}
    for name, runs in taken.items():
        peak = max(megabytes for _, megabytes in runs)
        ratio = median[name] / median[peer]
        print(f"{name:48}{median[name]:9.2f}{ratio:8.2f}{peak:9.0f}")
        seconds = [round(s, 3) for s, _ in runs]
        rows[name] = {"seconds": seconds, "ratio": round(ratio, 3), "peak_megabytes": round(peak)}
    return {"what": what, "peer": peer, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file to convert")
    parser.add_argument("--out", type=Path, default=Path("reports/bench/cpu.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="porter-bench-", dir=Path.cwd()) as folder:
        results = {"start-up": startup(Path(folder)), "conversion": conversion(Path(folder), options.gigabytes)}
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
