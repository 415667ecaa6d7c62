"""The original WanModel and WanVAE_ of Wan 2.1 and 2.2, at tiny size; see `conversions.record_reference`.

What stands between the original code and a run on the CPU in two precisions:

- Its packages are imported without their `__init__`, which needs more than the models.
- Its attention is flash attention, for GPUs and half precision; torch's scaled dot product takes its place.
- Its assertions that the modulation is float32 would refuse the run in float64; they are compiled away.
- For first and last frame, its module constant of image tokens is made smaller; its image width of 1280 stays.

Times are small, so that diffusers' sinusoids, of float32, are as exact as the original's of float64.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "Wan-Video/Wan2.1", "9737cba9c1c3c4d04b33fcad41c111989865d315"
REPOSITORY_22, COMMIT_22 = "Wan-Video/Wan2.2", "42bf4cfaa384bc21833865abc2f9e6c0e67233dc"
NOTE = "flash_attention replaced by torch's scaled dot product attention; assertions of float32 left out"

FRAMES, HEIGHT, WIDTH = 3, 4, 6  # of the latents; patches are 1 x 2 x 2
TOKENS = FRAMES * HEIGHT // 2 * WIDTH // 2
IMAGE_TOKENS, IMAGE_WIDTH = 3, 1280  # the width is fixed in the original code
TEXT_TOKENS = 512  # that many of the context are text where images stand before them, fixed on both sides


class _WithoutAssertions(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:  # from the source: cached bytecode has the assertions
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)


def _module(name: str) -> Any:
    """`wan.modules.<name>` of the checkout on sys.path."""
    for old in [old for old in sys.modules if old.partition(".")[0] == "wan"]:
        del sys.modules[old]
    for package in ("wan", "wan.modules"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    spec = importlib.util.find_spec(f"wan.modules.{name}")
    assert spec and spec.origin
    spec.loader = _WithoutAssertions(spec.name, spec.origin)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _unwarned():
        spec.loader.exec_module(module)
    return module


@contextmanager
def _unwarned() -> Iterator[None]:
    """The original asks for CUDA's autocast, by an old name; there is none here, and nothing is cast."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autocast", category=Warning)
        yield


def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, window_size: Any = (-1, -1)) -> Tensor:
    """What flash attention computes, in the precision of its inputs: q (B, L, N, E), k and v (B, S, N, E).

    Keys from `k_lens` (B) on are padding.
    """
    assert tuple(window_size) == (-1, -1), "a window is not used by any released model"
    mask = None if k_lens is None else (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def _transformer(kind: str, *, in_dim: int = 4, text_len: int = 6, text_dim: int = 20) -> nn.Module:
    original: Any = _module("model")
    original.flash_attention = attention
    original.FIRST_LAST_FRAME_CONTEXT_TOKEN_NUMBER = 2 * IMAGE_TOKENS
    module: nn.Module = original.WanModel(
        model_type=kind, patch_size=(1, 2, 2), text_len=text_len, in_dim=in_dim, dim=32, ffn_dim=40, freq_dim=12,
        text_dim=text_dim, out_dim=4, num_heads=2, num_layers=2,
    )  # fmt: skip
    return module


def _run(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Lists of videos and contexts, as the original takes them -> (1, C, F, H, W)."""
    more: dict[str, Any] = {"clip_fea": given["clip_fea"]} if "clip_fea" in given else {}
    more |= {"y": list(given["y"])} if "y" in given else {}
    with _unwarned():
        return torch.stack(model(list(given["x"]), given["t"], list(given["context"]), seq_len=TOKENS, **more))


def _samples(make: Callable[[torch.Generator, float], dict[str, Tensor]]) -> Any:
    """Two samples, each in a pass of its own, as the original embeds the patches of each by themselves."""

    def passes(module: Any, draw: torch.Generator) -> Passes:
        return {name: (_run, make(draw, time)) for name, time in (("first", 9.375), ("second", 2.1))}

    return passes


def _text(draw: torch.Generator, time: float) -> dict[str, Tensor]:
    """A video of 3 x 2 x 3 patches, a time, six text tokens."""
    video = torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, generator=draw)
    return {"x": video, "t": torch.tensor([time]), "context": torch.randn(1, 6, 20, generator=draw)}


def _image(images: int) -> Callable[[torch.Generator, float], dict[str, Tensor]]:
    """The same beside known frames and the tokens of one image, or two; all 512 text tokens."""

    def make(draw: torch.Generator, time: float) -> dict[str, Tensor]:
        more = {
            "y": torch.randn(1, 3, FRAMES, HEIGHT, WIDTH, generator=draw),
            "context": torch.randn(1, TEXT_TOKENS, 5, generator=draw),
            "clip_fea": torch.randn(images, IMAGE_TOKENS, IMAGE_WIDTH, generator=draw),
        }
        return _text(draw, time) | more

    return make


def _known_frame(draw: torch.Generator, time: float) -> dict[str, Tensor]:
    """A time for each token: those of the first frame, which is given, have time 0."""
    times = torch.full((1, TOKENS), time)
    times[:, : TOKENS // FRAMES] = 0
    return _text(draw, time) | {"t": times}


CONFIG = {"num_attention_heads": 2, "eps": 1e-6}
SKIP = "head"  # its table of shifts and scales belongs to no module in diffusers; what it does, head.head receives
TRANSFORMER_FILES = ("wan/modules/model.py",)


def _autoencoder(file: str, **options: Any) -> nn.Module:
    module: nn.Module = _module(file).WanVAE_(
        z_dim=3, num_res_blocks=1, temperal_downsample=[False, True], attn_scales=[], **options
    )
    return module


STATISTICS = {"latents_mean": [0.5, -0.25, 0.125], "latents_std": [1.5, 0.75, 2.0]}  # exact in float32


def _scaled(model: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    return [given["mean"], 1 / given["std"]]


def _encode(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    latents: Tensor = model.encode(given["x"], _scaled(model, given))
    return latents


def _decode(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """With the clamp that the original's pipeline puts behind it."""
    video: Tensor = model.decode(given["z"], _scaled(model, given)).clamp(-1, 1)
    return video


def _videos(frames: int, patch: int = 1) -> Any:
    def passes(module: Any, draw: torch.Generator) -> Passes:
        """Two videos, four frames a call after the first, and latents of three; later calls see cached frames."""
        known = {name: torch.tensor(values) for name, values in zip(("mean", "std"), STATISTICS.values(), strict=True)}
        video = torch.randn(2, 3, frames, 8 * patch, 12 * patch, generator=draw).clamp(-1, 1)
        return {
            "encode": (_encode, {"x": video, **known}),
            "decode": (_decode, {"z": torch.randn(2, 3, 3, 2, 3, generator=draw), **known}),
        }

    return passes


ORIGINALS = (
    Original(
        "transformer-2.1-t2v", "transformer", REPOSITORY, COMMIT, TRANSFORMER_FILES, lambda: _transformer("t2v"),
        _samples(_text), CONFIG, skip=SKIP, note=NOTE,
    ),
    Original(
        "transformer-2.1-i2v", "transformer", REPOSITORY, COMMIT, TRANSFORMER_FILES,
        lambda: _transformer("i2v", in_dim=7, text_len=TEXT_TOKENS, text_dim=5), _samples(_image(1)), CONFIG,
        skip=SKIP, note=NOTE,
    ),
    Original(
        "transformer-2.1-flf2v", "transformer", REPOSITORY, COMMIT, TRANSFORMER_FILES,
        lambda: _transformer("flf2v", in_dim=7, text_len=TEXT_TOKENS, text_dim=5),
        _samples(_image(2)), CONFIG, skip=SKIP, note=f"{NOTE}; {2 * IMAGE_TOKENS} image tokens for 514",
    ),
    Original(
        "transformer-2.2-ti2v", "transformer", REPOSITORY_22, COMMIT_22, TRANSFORMER_FILES,
        lambda: _transformer("ti2v"), _samples(_known_frame), CONFIG, skip=SKIP, note=NOTE,
    ),
    Original(
        "vae-2.1", "vae", REPOSITORY, COMMIT, ("wan/modules/vae.py",),
        lambda: _autoencoder("vae", dim=4, dim_mult=[1, 2, 3]), _videos(9), STATISTICS, samples=16,
    ),
    Original(
        "vae-2.2", "vae", REPOSITORY_22, COMMIT_22, ("wan/modules/vae2_2.py",),
        lambda: _autoencoder("vae2_2", dim=4, dec_dim=6, dim_mult=[1, 2, 2]), _videos(5, patch=2), STATISTICS,
        samples=16,
    ),
)  # fmt: skip
