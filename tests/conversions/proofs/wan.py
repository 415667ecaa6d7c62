"""Wan 2.1 and 2.2: transformers and autoencoders."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from torch import Tensor

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_T2V_14B: Config = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
}  # fmt: skip
_T2V_1B: Config = {**_T2V_14B, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_I2V_14B: Config = {**_T2V_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_FLF2V_14B: Config = {**_I2V_14B, "pos_embed_seq_len": 514}
_TI2V_5B: Config = {
    **_T2V_14B, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30,
}  # fmt: skip


def _tiny(**more: object) -> Config:
    return {
        **_T2V_14B, "patch_size": (1, 2, 3), "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 5,
        "out_channels": 4, "text_dim": 20, "freq_dim": 14, "ffn_dim": 44, "num_layers": 3, "eps": 1e-5, **more,
    }  # fmt: skip


def _real(name: str, config: Config, model: str | None = None) -> Real:
    """`model` is the name of both tables; the T2V 14B's have none, as many models share them."""
    table = name if model is None else model
    return Real(name, config, Table("wan", "WanModel", table), Table("wan", "WanTransformer3DModel", table))


def _transformer(state: dict[str, Tensor], config: Config) -> Mapping[str, Tensor]:
    """diffusers' converter of single files leaves the positions of first and last frame under their old name."""
    made: dict[str, Tensor] = convert_wan_transformer_to_diffusers(state)
    if config["pos_embed_seq_len"]:
        made["condition_embedder.image_embedder.pos_embed"] = made.pop("img_emb.emb_pos")
    return made


_IMAGE: Config = {"image_dim": 28, "added_kv_proj_dim": 36}
TRANSFORMERS = tuple(
    Proof(
        f"wan-transformer-{name}", "conversions.wan.recipe:TRANSFORMER", tiny,
        of_class("diffusers", "WanTransformer3DModel"), real, oracle=_transformer,
    )
    for name, tiny, real in (
        (
            "t2v", _tiny(),
            (
                _real("Wan2.1 T2V 1.3B", _T2V_1B), _real("Wan2.1 T2V 14B, Wan2.2 T2V A14B", _T2V_14B, ""),
                _real("Wan2.2 TI2V 5B", _TI2V_5B), _real("Wan2.2 I2V A14B", {**_T2V_14B, "in_channels": 36}),
            ),
        ),
        ("i2v", _tiny(**_IMAGE), (_real("Wan2.1 I2V 14B", _I2V_14B),)),
        ("flf2v", _tiny(**_IMAGE, pos_embed_seq_len=10), (_real("Wan2.1 FLF2V 14B", _FLF2V_14B),)),
        ("without-norm3", _tiny(cross_attn_norm=False), ()),
    )
)  # fmt: skip

_STATISTICS: Config = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
_VAE_21: Config = {
    **_STATISTICS, "base_dim": 96, "decoder_base_dim": None, "z_dim": 16, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None, "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}  # fmt: skip
_VAE_22: Config = {
    **_VAE_21, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48, "base_dim": 160, "decoder_base_dim": 256,
    "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16,
}  # fmt: skip
_SMALL: Config = {
    "base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 3], "temperal_downsample": [False, True], "scale_factor_temporal": 2,
    "latents_mean": [0.5, -0.25, 0.125], "latents_std": [1.5, 0.75, 2.0],
}  # fmt: skip


def _vae(name: str, real: Config, tiny: Config, **more: object) -> Proof:
    tables = (Table("wan", "WanVAE_", f"{name} VAE"), Table("wan", "AutoencoderKLWan", f"{name} VAE"))
    return Proof(
        f"wan-vae-{name}", "conversions.wan.vae_recipe:AUTOENCODER", {**real, **_SMALL, **tiny},
        of_class("diffusers", "AutoencoderKLWan"), (Real(name, real, *tables),), **more,  # type: ignore[arg-type]
    )  # fmt: skip


AUTOENCODERS = (
    _vae(
        "Wan2.1", _VAE_21, {"scale_factor_spatial": 4},
        oracle=lambda state, config: convert_wan_vae_to_diffusers(state),
        oracle_config={**_VAE_21, "base_dim": 4},  # it knows the released depth alone
    ),
    _vae(
        "Wan2.2", _VAE_22, {"decoder_base_dim": 5, "dim_mult": [1, 2, 2], "scale_factor_spatial": 8},
        no_oracle="diffusers' converter of single files has no names of 2.2; its script: tests/conversions/wan",
    ),
)  # fmt: skip

PROOFS = (*TRANSFORMERS, *AUTOENCODERS)
