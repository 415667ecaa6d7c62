"""Files and folders of real size that take no room: true headers over data that was never written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from conversions.common.autoencoder_kl.recipe import AUTOENCODER
from conversions.flux1.recipe import TRANSFORMER, original_headers
from porter.core.architectures import Architecture, architectures
from porter.core.checkpoint import header_bytes, spec

Shapes = Mapping[str, tuple[int, ...]]
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "in_channels": 3,
    "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "act_fn": "silu",
}  # fmt: skip
CLIP = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "eos_token_id": 2,
        "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}  # fmt: skip
T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "num_layers": 24, "num_heads": 64,
      "d_ff": 10240, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip


def names_of(known: Architecture) -> dict[str, tuple[int, ...]]:
    """Tensor names that fold into an architecture's templates, with its shapes."""
    made: dict[str, tuple[int, ...]] = {}
    for name, kinds in known.templates.items():
        shapes = [shape for count, shape in kinds for _ in range(count)]
        for index, shape in enumerate(shapes):
            made[name.replace("{}", str(index), 1).replace("{}", "0")] = shape
    return made


def layout(component: str, class_name: str, model: str | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor names of a recorded layout that diffusers or transformers write."""
    return names_of(next(
        known for known in architectures()
        if (known.component, known.class_name, known.layout) == (component, class_name, "diffusers")
        and model in (None, known.model)
    ))  # fmt: skip


def sparse(path: Path, shapes: Shapes, dtype: str = "BF16") -> Path:
    """A safetensors file of two-byte numbers with its real size."""
    head = header_bytes([spec(dtype, shape, name) for name, shape in shapes.items()], {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(2 * math.prod(shape) for shape in shapes.values()))
    return path


def flux_file(path: Path) -> Path:
    """FLUX.1-dev's transformer as one original file: 23.8 GB."""
    return sparse(path, {name: info.shape for name, info in original_headers(FLUX_DEV, "BF16").items()})


def flux_folder(root: Path) -> Path:
    """FLUX.1-dev as a diffusers folder, its transformer in three shards: 33.7 GB."""
    entries = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    configs = {
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0,
                                            "use_dynamic_shifting": True, "num_train_timesteps": 1000},
        "text_encoder/config.json": CLIP, "text_encoder_2/config.json": T5, "transformer/config.json": FLUX_DEV,
        "vae/config.json": VAE, "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
        "model_index.json": {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0", **entries},
    }  # fmt: skip
    for name, content in configs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    sparse(root / "text_encoder" / "model.safetensors", layout("text_encoder", "CLIPTextModel"))
    sparse(root / "text_encoder_2" / "model.safetensors", layout("text_encoder", "T5EncoderModel"))
    vae = {name: info.shape for name, info in AUTOENCODER.target_headers(VAE).items()}
    sparse(root / "vae" / "diffusion_pytorch_model.safetensors", vae)
    tensors = [(name, info.shape) for name, info in TRANSFORMER.target_headers(FLUX_DEV).items()]
    third = len(tensors) // 3 + 1
    places: dict[str, str] = {}
    for number in range(3):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors"
        part = dict(tensors[number * third : (number + 1) * third])
        sparse(root / "transformer" / file, part)
        places |= dict.fromkeys(part, file)
    index = root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return root
