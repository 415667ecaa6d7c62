"""Z-Image: the original code's names, which are diffusers' own, and the single file's."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_REAL: Config = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560,
    "siglip_feat_dim": None, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}  # fmt: skip
_TINY: Config = {
    **_REAL, "in_channels": 3, "dim": 48, "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 20,
    "axes_dims": (4, 6, 6), "axes_lens": (96, 32, 32),
}  # fmt: skip
_CLASS = of_class("diffusers", "ZImageTransformer2DModel")
_SAME = "the names are diffusers' own: no converter exists"


def _real(class_name: str) -> tuple[Real, ...]:
    target = Table("z_image", "ZImageTransformer2DModel", layout="diffusers")
    return (
        Real("Z-Image and Z-Image-Turbo", _REAL, Table("z_image", class_name, layout=_LAYOUTS[class_name]), target),
    )


_LAYOUTS = {"ZImageTransformer2DModel": "original", "NextDiT": "single-file"}
PROOFS = (
    Proof(
        "z-image-transformer", "conversions.z_image.recipe:TRANSFORMER", _TINY, _CLASS,
        _real("ZImageTransformer2DModel"), no_oracle=_SAME,
    ),
    Proof(
        "z-image-transformer-two-patch-sizes-without-norms", "conversions.z_image.recipe:TRANSFORMER",
        {**_TINY, "all_patch_size": (2, 4), "all_f_patch_size": (1, 3), "qk_norm": False}, _CLASS, (), no_oracle=_SAME,
    ),
    *(
        Proof(
            f"z-image-transformer-single-file{name}", "conversions.z_image.recipe:SINGLE_FILE", {**_TINY, **more},
            _CLASS, real, oracle=lambda state, config: convert_z_image_transformer_checkpoint_to_diffusers(state),
        )
        for name, more, real in (
            ("", {}, _real("NextDiT")),
            ("-with-norm-final", {"_norm_final": True}, ()),
            ("-with-siglip", {"siglip_feat_dim": 28}, ()),
        )
    ),
)  # fmt: skip
