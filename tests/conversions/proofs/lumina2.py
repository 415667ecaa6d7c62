"""Lumina-Image 2.0."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_REAL: Config = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "hidden_size": 2304, "num_layers": 26,
    "num_refiner_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8, "multiple_of": 256,
    "ffn_dim_multiplier": None, "norm_eps": 1e-5, "scaling_factor": 1.0, "axes_dim_rope": (32, 32, 32),
    "axes_lens": (300, 512, 512), "cap_feat_dim": 2304, "_norm_final": True,
}  # fmt: skip
_TINY: Config = {
    **_REAL, "in_channels": 3, "out_channels": 3, "hidden_size": 48, "num_layers": 3, "num_attention_heads": 6,
    "num_kv_heads": 2, "multiple_of": 40, "ffn_dim_multiplier": 0.75, "axes_dim_rope": (4, 2, 2),
    "axes_lens": (24, 12, 10), "cap_feat_dim": 20,
}  # fmt: skip
# The converter splits at the released width; the rest is as small as it goes.
_RELEASED_WIDTH: Config = {
    **_REAL, "num_layers": 1, "num_refiner_layers": 1, "multiple_of": 8, "ffn_dim_multiplier": 0.001,
}  # fmt: skip
PROOFS = tuple(
    Proof(
        f"lumina2-transformer{name}", "conversions.lumina2.recipe:TRANSFORMER", {**_TINY, **more},
        of_class("diffusers", "Lumina2Transformer2DModel"), real,
        oracle=lambda state, config: convert_lumina2_to_diffusers(state), oracle_config={**_RELEASED_WIDTH, **more},
    )
    for name, more, real in (
        ("", {}, (Real("Lumina-Image-2.0", _REAL, Table("lumina2", "NextDiT"),
                       Table("lumina2", "Lumina2Transformer2DModel")),)),
        ("-without-refiners-and-norm-final", {"num_refiner_layers": 0, "_norm_final": False}, ()),
    )
)  # fmt: skip
