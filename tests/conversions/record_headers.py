"""Write the original FLUX.1 code's tensor tables, as its own classes make them on the meta device.

    python tests/conversions/record_headers.py <checkout of black-forest-labs/flux>

The result is committed: tests hold porter's source headers to it and need no checkout. It shares no code with porter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).parent
# As in the checkout's util.py, `configs["flux-dev"]` and `configs["flux-schnell"]`.
FLUX = {
    "in_channels": 64, "out_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10_000, "qkv_bias": True,
}  # fmt: skip
AE = {
    "resolution": 256, "in_channels": 3, "ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip


def main(checkout: Path) -> None:
    """Build both models on meta and write their tables."""
    package = types.ModuleType("flux")
    package.__path__ = [str(checkout / "src" / "flux")]  # without its __init__, which computes a version
    sys.modules["flux"] = package
    from flux.model import Flux, FluxParams
    from flux.modules.autoencoder import AutoEncoder, AutoEncoderParams

    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    about = {
        "repository": "https://github.com/black-forest-labs/flux",
        "commit": commit,
        "command": "python tests/conversions/record_headers.py <checkout>",
        "layout": "name template with * for 0 … count-1: [shape, count]; a plain name: [shape, 1]",
    }
    with torch.device("meta"):
        for name, guidance in (("dev", True), ("schnell", False)):
            params = {**FLUX, "guidance_embed": guidance}
            state = Flux(FluxParams(**params)).state_dict()
            write(HERE / "flux1" / f"original_{name}.json", {**about, "params": params}, state)
        state = AutoEncoder(AutoEncoderParams(**AE)).state_dict()
        write(HERE / "common" / "autoencoder_kl" / "original_flux1_ae.json", {**about, "params": AE}, state)


def write(path: Path, about: dict[str, object], state: dict[str, torch.Tensor]) -> None:
    """Fold block indices into templates where all blocks agree, and write the table."""
    blocks: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for name, tensor in state.items():
        found = re.fullmatch(r"(\w+_blocks)\.(\d+)\.(.+)", name)
        key, index = (f"{found[1]}.*.{found[3]}", int(found[2])) if found else (name, 0)
        blocks[key, tuple(tensor.shape)].append(index)
    for (name, _), indices in blocks.items():
        assert indices == list(range(len(indices))), name
    assert len({name for name, _ in blocks}) == len(blocks)
    tensors = {name: [list(shape), len(indices)] for (name, shape), indices in blocks.items()}
    document = {**about, "tensor_count": len(state), "tensors": tensors}
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
