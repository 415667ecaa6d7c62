"""A process of its own that loads and runs a port, for what only a whole process shows: its peak, and its limits.

python big.py peaks FOLDER SMALL   prints {offload: {"peak": bytes, "digest": …}} of a picture each; SMALL warms up
python big.py limit FOLDER MB OUT  `porter generate` without and with layer offload, with so much more address
                                   space than its imports take; prints both exit codes
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import re
import resource
import sys
from pathlib import Path

import torch

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2}


def status(field: str) -> int:
    """Bytes of a field of this process's status, as VmHWM."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peaks(folder: str, small: str) -> None:
    from runtime.registry import load

    load(small, dtype=torch.float32, device="cpu").generate("warm", **SIZE)  # imports, and what libraries keep
    found = {}
    for offload in ("layer", "component", "none"):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = status("VmRSS")
        pipeline = load(folder, dtype=torch.float32, device="cpu", offload=offload)
        output = pipeline.generate("a red circle", **SIZE).output
        del pipeline
        assert output is not None
        digest = hashlib.sha256(output.numpy().tobytes()).hexdigest()
        found[offload] = {"peak": status("VmHWM") - before, "digest": digest}
    print(json.dumps(found))


def limit(folder: str, megabytes: str, out: str) -> None:
    import diffusers
    import transformers

    import conversions.flux1.pipeline
    import runtime.generate
    from porter.cli import main

    assert diffusers.FluxPipeline and transformers.T5EncoderModel and conversions and runtime  # what runs is imported
    most = status("VmSize") + (int(megabytes) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    asked = ["generate", folder, "a red circle", "--height", "32", "--width", "32", "--steps", "1", "-o"]
    codes = [main([*asked, f"{out}/whole.png"]), main([*asked, f"{out}/layers.png", "--offload", "layer"])]
    print(json.dumps(codes))


if __name__ == "__main__":
    {"peaks": peaks, "limit": limit}[sys.argv[1]](*sys.argv[2:])
