"""Qwen-Image: the transformer, whose names nobody changed, and the autoencoder in Wan's names."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_REAL: Config = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False,
}  # fmt: skip
_TINY: Config = {
    **_REAL, "in_channels": 12, "out_channels": 5, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
_MARKED = {"zero_cond_t": True, "_marked": True}


def _table(model: str) -> Table:
    return Table("qwen_image", "QwenImageTransformer2DModel", model)


_VAE: Config = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "input_channels": 3, "latents_mean": [0.5] * 16,
    "latents_std": [2.0] * 16,
}  # fmt: skip
_VAE_TINY: Config = {
    **_VAE, "base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [False, True],
    "input_channels": 4, "latents_mean": [0.5, 0.25, 0.125], "latents_std": [2.0, 1.5, 0.75],
}  # fmt: skip

_WAN = Table("wan", "WanVAE_", "Wan2.1 VAE")

PROOFS = (
    *(
        Proof(
            f"qwen-image-transformer{name}", "conversions.qwen_image.recipe:TRANSFORMER", {**_TINY, **more},
            of_class("diffusers", "QwenImageTransformer2DModel"), (Real(model, {**_REAL, **more}, source, target),),
            no_oracle="the names are diffusers' own: no converter exists",
        )
        for name, model, more, source, target in (
            ("", "Qwen-Image and -Edit", {}, _table(""), _table("")),
            ("-layered", "Qwen-Image-Layered", _LAYERED, _table("Qwen-Image-Layered"), _table("Qwen-Image-Layered")),
            ("-marked", "Qwen-Image-Edit-2511", _MARKED, _table("Qwen-Image-Edit-2511"), _table("")),
        )
    ),
    Proof(
        "qwen-image-autoencoder", "conversions.qwen_image.vae_recipe:AUTOENCODER", _VAE_TINY,
        of_class("diffusers", "AutoencoderKLQwenImage"),
        (Real("Qwen-Image", _VAE, _WAN, Table("qwen_image", "AutoencoderKLQwenImage")),),
        oracle=lambda state, config: convert_wan_vae_to_diffusers(state),
        oracle_config={**_VAE, "base_dim": 4, "z_dim": 3, "input_channels": 4},
    ),
)  # fmt: skip
