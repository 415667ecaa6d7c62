"""kill -9 at twenty random moments, in shards and with several threads: never a wrong file, never a lost source."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversions.flux1.recipe import original_headers
from porter.core.convert import convert
from tests.bench import WIDTH, write_checkpoint
from tests.commands.test_convert import ROOT, tree

MOMENTS = 20


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    """A file of 0.2 GB in shards of 25 MB; each kill is followed by the same command, which continues."""
    config = {"_class_name": "FluxTransformer2DModel", **WIDTH, "num_attention_heads": 12}
    config |= {"num_layers": 2, "num_single_layers": 2}
    source, settings = tmp_path / "flux1.safetensors", tmp_path / "config.json"
    settings.write_text(json.dumps(config))
    write_checkpoint(source, original_headers(config, "BF16"))
    before = source.read_bytes()
    convert(source, tmp_path / "undisturbed", config=config, shard_size="25MB")
    wanted = tree(tmp_path / "undisturbed")
    del wanted["manifest.json"]
    out = tmp_path / "port"
    arguments = ["convert", str(source), "--config", str(settings), "-o", str(out), "--shard-size", "25MB", "--quiet"]
    draw, killed, kept = random.Random(0), 0, 0
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "porter.cli", *arguments], cwd=ROOT, check=True)
    usual = time.monotonic() - began
    while killed < MOMENTS:
        assert tree(out).keys() == {*wanted, "manifest.json"}
        subprocess.run(["rm", "-r", str(out)], check=True)
        workers = ["--workers", str(draw.choice((1, 2, 4)))]
        while not out.exists():  # until a run is left alone long enough
            process = subprocess.Popen([sys.executable, "-m", "porter.cli", *arguments, *workers], cwd=ROOT)
            try:
                process.wait(timeout=draw.uniform(0.15, 1.0) * usual)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
                kept += any(tmp_path.glob(".port.partial-*/transformer/*.safetensors"))
            assert out.exists() or process.returncode == -signal.SIGKILL
        found = tree(out)
        del found["manifest.json"]
        assert found == wanted, f"after {killed} kills"
        assert source.read_bytes() == before
        if process.returncode == 0:  # else the last kill came between the rename and the end of the process
            assert list(tmp_path.glob(".port*")) == []
    print(f"killed {killed} times, {kept} with finished shards to continue from")
    assert kept
