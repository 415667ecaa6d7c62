"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_COMMON: Config = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
_MEDIUM: Config = {
    **_COMMON, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip
_MEDIUM_35: Config = {
    **_MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
_LARGE_35: Config = {
    **_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
}  # fmt: skip


def _tiny(**more: object) -> Config:
    return {
        "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 64,
        "num_attention_heads": 1, "joint_attention_dim": 24, "caption_projection_dim": 64,
        "pooled_projection_dim": 20, "out_channels": 5, "pos_embed_max_size": 6, "dual_attention_layers": (),
        "qk_norm": None, **more,
    }  # fmt: skip


def _real(name: str, config: Config) -> Real:
    return Real(name, config, Table("sd3", "MMDiTX", name), Table("sd3", "SD3Transformer2DModel", name))


_REAL = (
    _real("Stable Diffusion 3 medium", _MEDIUM), _real("Stable Diffusion 3.5 medium", _MEDIUM_35),
    _real("Stable Diffusion 3.5 large", _LARGE_35),
)  # fmt: skip
PROOFS = tuple(
    Proof(
        f"sd3-transformer-{name}", "conversions.sd3.recipe:TRANSFORMER", tiny,
        of_class("diffusers", "SD3Transformer2DModel"), real,
        oracle=lambda state, config: convert_sd3_transformer_checkpoint_to_diffusers(state),
    )
    for name, tiny, real in (
        ("medium", _tiny(), _REAL[:1]),
        ("3.5-medium", _tiny(dual_attention_layers=(0, 1), qk_norm="rms_norm"), _REAL[1:2]),
        ("3.5-large", _tiny(qk_norm="rms_norm"), _REAL[2:]),
    )
)  # fmt: skip
