"""Stable Diffusion 3 at tiny size: a pipeline folder written by diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.loader import quiet_libraries

TOKENIZERS = Path(__file__).parents[3] / "porter" / "builtin" / "tiny_flux"
MEDIUM: dict[str, Any] = {}
LARGE_35: dict[str, Any] = {"qk_norm": "rms_norm"}
MEDIUM_35: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def write_port(folder: Path, variant: dict[str, Any], *, t5: bool = True, **schedule: Any) -> Path:
    """A StableDiffusion3Pipeline folder with random weights; pictures of 64 pixels, at most 96."""
    import transformers as words
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers import StableDiffusion3Pipeline as Reference

    torch.manual_seed(11)
    clip = {"vocab_size": 610, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    # fmt: off
    clips = [
        words.CLIPTextModelWithProjection(words.CLIPTextConfig(
            **clip, hidden_size=width, intermediate_size=64, num_attention_heads=4, num_hidden_layers=layers,
            projection_dim=out, hidden_act=act,
        ))
        for width, layers, out, act in ((32, 2, 24, "quick_gelu"), (40, 3, 20, "gelu"))
    ]
    reader = words.T5EncoderModel(words.T5Config(
        vocab_size=130, d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    ))
    transformer = SD3Transformer2DModel(**{
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 96, "caption_projection_dim": 48,
        "pooled_projection_dim": 44, "pos_embed_max_size": 12,
    } | variant)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=32,
        scaling_factor=0.7, shift_factor=0.2, use_quant_conv=False, use_post_quant_conv=False,
    )
    # fmt: on
    with torch.no_grad():
        for model in (*clips, reader, transformer, vae):  # away from 0 and 1, so that nothing is trivially equal
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    first, second = (words.CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer") for _ in range(2))
    second.pad_token = "!"  # as in the released models
    with quiet_libraries():
        Reference(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | schedule),
            vae=vae,
            text_encoder=clips[0],
            tokenizer=first,
            text_encoder_2=clips[1],
            tokenizer_2=second,
            text_encoder_3=reader if t5 else None,
            tokenizer_3=words.T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2") if t5 else None,
        ).save_pretrained(folder)
    return folder


def diffusers_pipeline(port: Path) -> Any:
    """diffusers' own pipeline of a port, float32."""
    from diffusers import StableDiffusion3Pipeline as Reference

    without = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (port / name).exists()}
    with quiet_libraries():
        pipe = Reference.from_pretrained(port, low_cpu_mem_usage=False, dtype=torch.float32, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe
