"""Memory formulas of autoencoders (decoding) and of the U-Net against torch's tracker, at released configs.

The configs are facts from the released models' config files; what stands there as the class default is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import pytest

from porter.core.memory import formula_of
from porter.core.workload import Workload, full_config, latents_of
from tests.memory_tracker import measure

Config = Mapping[str, Any]


class Size(NamedTuple):
    """Pixels, pixel frames, and how many at once."""

    height: int
    width: int
    frames: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Released:
    """A released model's component, and sizes that it is used at."""

    name: str
    class_name: str
    config: Config
    channels: int
    space: int  # pixels per latent position, each way
    sizes: tuple[Size, ...]
    time: int = 1
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # inputs besides, without the batch

    def full_config(self) -> dict[str, Any]:
        """The config with the class's defaults, as diffusers saves it."""
        return full_config("diffusers", self.class_name, self.config)

    def workload(self, size: Size, dtype: str) -> Workload:
        work = Workload(dtype, size.height, size.width, size.frames, size.batch)
        if self.class_name == "UNet2DConditionModel":
            return work  # an autoencoder's config tells the compression
        work = latents_of(self.full_config(), work)
        assert (work.spatial, work.temporal) == (self.space, self.time)
        return work

    def latents(self, work: Workload) -> tuple[int, ...]:
        """The shape of the latents: [batch, channels, height, width], with frames before the height for videos."""
        flat = self.class_name in ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "UNet2DConditionModel")
        frames = () if flat else (work.latent_frames,)
        return (work.batch, self.channels, *frames, work.latent_height, work.latent_width)


FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
IMAGES = (Size(512, 512), Size(1024, 768, batch=2), Size(1024, 1024))
VAES = [
    Released("sd1 and sdxl", "AutoencoderKL", {**FOUR, "latent_channels": 4}, 4, 8, IMAGES),
    Released(
        "sd3 and flux1", "AutoencoderKL",
        {**FOUR, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 16, 8, IMAGES,
    ),
    Released("flux2", "AutoencoderKLFlux2", {}, 32, 8, IMAGES),
    Released(
        "sana", "AutoencoderDC",
        {
            "latent_channels": 32,
            "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
            "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
            "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "upsample_block_type": "interpolate",
            "downsample_block_type": "conv",
        },
        32, 32, IMAGES,
    ),
    Released("qwen-image", "AutoencoderKLQwenImage", {}, 16, 8, (*IMAGES[:2], Size(1328, 1328)), 4),
    Released("qwen-image 2.1", "AutoencoderKLQwenImage21", {}, 64, 16, (*IMAGES[:2], Size(1328, 1328)), 8),
    Released(
        "wan 2.1", "AutoencoderKLWan", {}, 16, 8,
        (Size(480, 832, 17), Size(704, 1280, 1, 2), Size(480, 832, 5), Size(720, 1280, 81)), 4,
    ),
    Released(
        "wan 2.2 ti2v", "AutoencoderKLWan",
        {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "is_residual": True,
            "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
        },
        48, 16, (Size(480, 832, 13), Size(704, 1280, 1, 2), Size(480, 832, 5), Size(704, 1280, 121)), 4,
    ),
    Released(
        "hunyuanvideo", "AutoencoderKLHunyuanVideo", {}, 16, 8,
        (Size(320, 512, 33), Size(544, 960, 9, 2), Size(720, 1280, 129), Size(1088, 1920, 1), Size(1088, 1920, 33)), 4,
    ),
    Released(  # short: the class fills its attention's mask row by row, which takes minutes for a real length
        "hunyuanvideo 1.5", "AutoencoderKLHunyuanVideo15", {}, 32, 16, (Size(128, 192, 5), Size(256, 384, 1)), 4,
    ),
    Released(
        "ltx2", "AutoencoderKLLTX2Video", {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}, 128, 32,
        (Size(512, 704, 33), Size(480, 704, 97, 2), Size(512, 768, 121)), 8,
    ),
    Released(
        "ltx 0.9", "AutoencoderKLLTXVideo", {}, 128, 32,
        (Size(512, 704, 33), Size(480, 704, 97, 2), Size(512, 704, 161), Size(512, 704, 1)), 8,
    ),
    Released(
        "ltx 0.9.5", "AutoencoderKLLTXVideo",
        {
            "block_out_channels": (128, 256, 512, 1024, 2048),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "decoder_block_out_channels": (256, 512, 1024),
            "layers_per_block": (4, 6, 6, 2, 2),
            "decoder_layers_per_block": (5, 5, 5, 5),
            "spatio_temporal_scaling": (True,) * 4,
            "decoder_spatio_temporal_scaling": (True,) * 3,
            "decoder_inject_noise": (False,) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "upsample_residual": (True,) * 3,
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        128, 32, (Size(512, 704, 33), Size(480, 704, 97, 2), Size(512, 704, 161)), 8, {"temb": ()},
    ),
    Released(
        "mochi", "AutoencoderKLMochi", {}, 12, 8,
        (Size(480, 848, 85), Size(256, 448, 25, 2), Size(480, 848, 7), Size(480, 848, 163)), 6,
    ),
    Released(
        "cogvideox", "AutoencoderKLCogVideoX", {}, 16, 8,
        (Size(480, 720, 17), Size(480, 720, 9, 2), Size(480, 720, 1), Size(480, 720, 49), Size(768, 1360, 13)), 4,
    ),
]  # fmt: skip

SD = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}  # fmt: skip
UNETS = [
    Released("sd1", "UNet2DConditionModel", SD, 4, 8, (Size(512, 512, batch=2), Size(768, 1152, batch=1))),
    Released(
        "sd2", "UNet2DConditionModel",
        SD | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
              "use_linear_projection": True},
        4, 8, (Size(768, 768, batch=2), Size(512, 512)),
    ),
    Released(
        "sdxl", "UNet2DConditionModel",
        {
            "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        4, 8, (Size(1024, 1024, batch=2), Size(512, 768)),
        extra={"text_embeds": (1280,), "time_ids": (6,)},
    ),
]  # fmt: skip


def checks(models: list[Released]) -> Iterator[Any]:
    """Every model at every size in bfloat16 and float32; in every run, autoencoders have two sizes, once in each."""
    for model in models:
        for number, size in enumerate(model.sizes):
            for dtype in ("BF16", "F32"):
                often = (number, dtype) == (0, "BF16")
                shape = "x".join(map(str, (size.batch, size.frames, size.height, size.width)))
                marks = () if often else pytest.mark.slow
                yield pytest.param(model, size, dtype, id=f"{model.name} {shape} {dtype}", marks=marks)


@pytest.mark.parametrize(("model", "size", "dtype"), list(checks(VAES)))
def test_decoding_needs_what_the_tracker_sees(model: Released, size: Size, dtype: str) -> None:
    def decode(module: Any, latents: Any, **extra: Any) -> Any:
        return module.decode(latents, **extra)

    work = model.workload(size, dtype)
    inputs = {"latents": model.latents(work)} | {name: (size.batch, *shape) for name, shape in model.extra.items()}
    measured = measure(lambda: getattr(diffusers, model.class_name)(**model.config), inputs, dtype, decode)
    estimate = formula_of(model.class_name)(model.full_config(), work)
    assert 0.85 <= estimate / measured.activations <= 1.15, (estimate, measured.activations)


@pytest.mark.parametrize(("model", "size", "dtype"), list(checks(UNETS)))
def test_a_unet_needs_what_the_tracker_sees(model: Released, size: Size, dtype: str) -> None:
    work = model.workload(size, dtype)
    inputs: dict[str, Any] = {
        "sample": model.latents(work),
        "timestep": 1,
        "encoder_hidden_states": (size.batch, work.text_tokens, model.config["cross_attention_dim"]),
    }
    if model.extra:
        inputs["added_cond_kwargs"] = {name: (size.batch, *shape) for name, shape in model.extra.items()}
    measured = measure(lambda: diffusers.UNet2DConditionModel(**model.config), inputs, dtype)
    estimate = formula_of(model.class_name)(model.full_config(), work)
    assert 0.85 <= estimate / measured.activations <= 1.15, (estimate, measured.activations)
