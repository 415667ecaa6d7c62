"""A port at tiny size, made with diffusers' own classes: nothing of ours takes part in writing it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

BUILTIN = Path(__file__).parents[2] / "porter" / "builtin" / "tiny_flux"


def write_port(
    folder: Path,
    *,
    guidance: bool = True,
    heads: int = 3,
    pipeline: str = "FluxPipeline",
    widths: tuple[int, ...] = (32, 32, 64),
    filled: bool = False,
) -> Path:
    """A pipeline folder with random transformer and autoencoder, and the embedded model's text encoders.

    Args:
        pipeline: `_class_name`.
        widths: channels of the autoencoder's levels.
        filled: whether the transformer also takes a picture's latents and a mask.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    folder.mkdir(parents=True)
    for name in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(BUILTIN / name, folder / name)
    index = json.loads((BUILTIN / "model_index.json").read_text()) | {"_class_name": pipeline}
    (folder / "model_index.json").write_text(json.dumps(index))
    context = json.loads((folder / "text_encoder_2" / "config.json").read_text())["d_model"]
    pooled = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        in_channels=16 + (16 + 4 * 4 ** (len(widths) - 1) if filled else 0),
        out_channels=16 if filled else None,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=context,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=widths[0],
        sample_size=64,
        scaling_factor=0.7,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for model in (transformer, vae):  # away from 0 and 1, so that nothing is trivially equal
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    return folder
