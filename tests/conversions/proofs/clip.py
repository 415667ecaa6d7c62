"""CLIP's text encoders, as Stable Diffusion 1.x, 2.x and XL have them."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from torch import Tensor, nn

from tests.conversions.proofs import Config, Proof, Real, Table

RECIPES = "conversions.common.clip.recipe"


def _config(width: int, layers: int, heads: int, projection: int, **more: object) -> Config:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 77,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "initializer_range": 0.02,
        "initializer_factor": 1.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "model_type": "clip_text_model", **more,
    }  # fmt: skip


def _tiny(layers: int, **more: object) -> Config:
    small = {"vocab_size": 50, "intermediate_size": 40, "max_position_embeddings": 9}
    return _config(16, layers, 2, 24, **small, **more)


_SCALE = {"logit_scale": ()}
_VISUAL = {
    "visual.class_embedding": (12,), "visual.positional_embedding": (5, 12), "visual.proj": (12, 24),
    "visual.conv1.weight": (12, 3, 2, 2), "visual.ln_pre.weight": (12,), "visual.ln_post.bias": (12,),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (36, 12),
    "visual.transformer.resblocks.0.mlp.c_fc.bias": (48,),
}  # fmt: skip


def _module(class_name: str) -> Callable[[Config], nn.Module]:
    """config -> transformers' class, its tensors called as in released files."""

    def build(config: Config) -> nn.Module:
        cls = getattr(transformers, class_name)
        module: nn.Module = cls(cls.config_class(**{k: v for k, v in config.items() if not k.startswith("_")}))
        return module if hasattr(module, "text_model") else nn.ModuleDict({"text_model": module})

    return build


def _open_clip(prefix: str) -> Callable[[dict[str, Tensor], Config], dict[str, Tensor]]:
    """The converter reads its model's config only where a file has no projection."""

    def oracle(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{
            key: value for key, value in config.items() if not key.startswith("_")
        }))  # fmt: skip
        whole = {prefix + name: tensor for name, tensor in state.items()}
        converted: dict[str, Tensor] = convert_open_clip_checkpoint(model, whole, prefix)
        return converted

    return oracle


def _ldm_clip(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    whole = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in state.items()}
    converted: dict[str, Tensor] = convert_ldm_clip_checkpoint(whole)
    return converted


def _table(class_name: str, model: str, layout: str) -> Table:
    return Table("common/clip", class_name, model, layout)


_H, _BIGG, _L = "OpenCLIP ViT-H/14 text", "OpenCLIP ViT-bigG/14 text", "CLIP ViT-L/14 text"
_SD2 = _config(1024, 23, 16, 512, _unused={**_SCALE, "text_projection": (1024, 1024)})
_SD1 = _config(768, 12, 12, 768, hidden_act="quick_gelu")
_PENULTIMATE = {**_SCALE, "text_projection": (16, 24)}

PROOFS = (
    Proof(
        "open-clip-with-projection", f"{RECIPES}:WITH_PROJECTION", _tiny(3, _unused=_SCALE),
        _module("CLIPTextModelWithProjection"),
        (
            Real(
                "Stable Diffusion XL's text_encoder_2", _config(1280, 32, 20, 1280, _unused=_SCALE),
                _table("CLIP", _BIGG, "original"), _table("CLIPTextModelWithProjection", _BIGG, "diffusers"),
            ),
        ),
        _open_clip("conditioner.embedders.1.model."),
    ),
    Proof(
        "open-clip-with-images", f"{RECIPES}:WITH_PROJECTION", _tiny(3, _unused={**_SCALE, **_VISUAL}),
        _module("CLIPTextModelWithProjection"), (), _open_clip("conditioner.embedders.1.model."),
    ),
    Proof(  # the oracle leaves out layer 23, whatever the model: so there are 24
        "open-clip-penultimate", f"{RECIPES}:PENULTIMATE", _tiny(3, _unused=_PENULTIMATE), _module("CLIPTextModel"),
        (
            Real(
                "Stable Diffusion 2.x's text_encoder", _SD2, _table("CLIP", _H, "original"),
                _table("CLIPTextModel", f"{_H}, 23 layers", "diffusers"),
            ),
        ),
        _open_clip("cond_stage_model.model."), oracle_config=_tiny(23, _unused=_PENULTIMATE),
    ),
    Proof(
        "clip-kept", f"{RECIPES}:KEPT", _tiny(3), _module("CLIPTextModel"),
        (
            Real(
                "Stable Diffusion 1.x's and XL's text_encoder", _SD1, _table("CLIPTextModel", _L, "diffusers"),
                _table("CLIPTextModel", _L, "diffusers"),
            ),
        ),
        _ldm_clip,
    ),
    Proof(
        "clip-kept-with-positions", f"{RECIPES}:KEPT",
        _tiny(2, _unused={"text_model.embeddings.position_ids": (1, 9)}), _module("CLIPTextModel"), (),
        no_oracle="diffusers' converter keeps the buffer, and its loader ignores it",
    ),
)  # fmt: skip
