"""Pipelines of Wan at tiny size, made and saved by diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from runtime.loader import quiet_libraries

TOKENIZER = Path(__file__).parents[3] / "porter" / "builtin" / "tiny_flux" / "tokenizer_2"
PICTURE = {"image_dim": 20, "added_kv_proj_dim": 36}


def drawn(module: nn.Module) -> Any:
    """Every parameter away from 0 and 1, so that nothing is trivially equal."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def transformer(**changes: Any) -> Any:
    defaults = {
        "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 24,
        "freq_dim": 32, "ffn_dim": 40, "num_layers": 2,
    }  # fmt: skip
    return drawn(WanTransformer3DModel(**defaults | changes))


def write_port(folder: Path, kind: str) -> Any:
    """Write a pipeline folder, and return diffusers' pipeline with the same weights.

    kind: t2v · a14b (two denoisers) · 5b (a time for each patch) · i2v · flf2v (CLIP's tokens; of two pictures) ·
    i2v-a14b · i2v-5b.
    """
    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.5, -0.25, 0.125, 0.3], latents_std=[1.5, 0.75, 2.0, 0.9],
    )  # fmt: skip
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": drawn(UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **size))),
        "vae": drawn(vae),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    pictures = kind in ("i2v", "flf2v")
    changes: dict[str, Any] = {"in_channels": 12} if kind in ("i2v", "flf2v", "i2v-a14b") else {}
    changes |= PICTURE if pictures else {}
    changes |= {"pos_embed_seq_len": 10} if kind == "flf2v" else {}
    parts["transformer"] = transformer(**changes)
    if kind.endswith("a14b"):
        parts |= {"transformer_2": transformer(**changes), "boundary_ratio": 0.875}
    if kind.endswith("5b"):
        parts |= {"expand_timesteps": True, "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    if pictures:
        clip = CLIPVisionConfig(
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        parts["image_encoder"] = drawn(CLIPVisionModel(clip))
        square = {"height": 28, "width": 28}
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    with quiet_libraries():
        pipe = (WanPipeline if kind in ("t2v", "a14b", "5b") else WanImageToVideoPipeline)(**parts)
        pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
