"""Tiles and slices: every autoencoder class that native families use makes them, others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.core.errors import UsageError
from runtime.config import PipelineConfig
from runtime.registry import load
from runtime.stages.autoencoder import autoencoding, can
from tests.conversions.qwen_image.ports import write_port as write_qwen
from tests.runtime.memory.test_offload import write_flux, write_wan

# class -> (how a port with it is written, latents of two pictures or videos that take several tiles)
CLASSES: dict[str, tuple[Callable[[Path], Any], tuple[int, ...]]] = {
    "AutoencoderKL": (write_flux, (2, 4, 24, 24)),
    "AutoencoderKLQwenImage": (write_qwen, (2, 0, 1, 40, 36)),
    "AutoencoderKLWan": (lambda folder: write_wan(folder, "t2v"), (2, 4, 2, 40, 36)),
}


@pytest.mark.parametrize("offload", ["none", "layer"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_native_families_autoencoders(name: str, offload: str, tmp_path: Path) -> None:
    write, shape = CLASSES[name]
    write(tmp_path / "port")
    vae = load(tmp_path / "port", dtype=torch.float32, device="cpu", offload=offload).modules["vae"]
    assert type(vae).__name__ == name
    torch.manual_seed(0)
    latents = torch.randn(shape[0], shape[1] or vae.config.z_dim, *shape[2:])
    made, calls = {}, []
    whole, tiles = vae._decode, vae.tiled_decode
    vae._decode = lambda z, *a, **k: (calls.append(("decode", len(z))), whole(z, *a, **k))[1]
    vae.tiled_decode = lambda z, *a, **k: (calls.append(("tiles", len(z))), tiles(z, *a, **k))[1]
    for way in ({}, {"vae_tiling": True}, {"vae_slicing": True}, {}):
        calls.clear()
        with autoencoding(vae, PipelineConfig(**way)):
            image = vae.decode(latents, return_dict=False)[0]
        assert any(word == "tiles" for word, _ in calls) == ("vae_tiling" in way)
        assert {count for _, count in calls} == ({1} if "vae_slicing" in way else {2})
        made[next(iter(way), "whole")] = image
    assert made["vae_tiling"].shape == made["whole"].shape
    assert made["vae_tiling"].isfinite().all()
    assert (made["vae_slicing"] - made["whole"]).abs().max() < 1e-4


def test_other_classes_are_refused_by_name() -> None:
    from diffusers import AutoencoderKL, VQModel

    assert can(AutoencoderKL(), "tiling")
    vae = VQModel()
    for way in ("vae_tiling", "vae_slicing"):
        if not can(vae, way.removeprefix("vae_")):
            with pytest.raises(UsageError, match="VQModel"), autoencoding(vae, PipelineConfig(**{way: True})):
                pass
    assert not can(vae, "tiling")
