"""DiT."""

from __future__ import annotations

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_XL: Config = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-6,
}  # fmt: skip
_TINY: Config = {
    "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 3, "out_channels": 5, "num_layers": 4,
    "sample_size": 12, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6,
}  # fmt: skip


def _real(size: int) -> Real:
    name = f"DiT-XL/2 {size}x{size}"
    target = Table("dit", "DiTTransformer2DModel")  # holds nothing of the picture's size
    return Real(name, {**_XL, "sample_size": size // 8}, Table("dit", "DiT", name), target)


PROOFS = (
    Proof(
        "dit-transformer", "conversions.dit.recipe:TRANSFORMER", _TINY,
        of_class("diffusers", "DiTTransformer2DModel"), (_real(256), _real(512)),
        no_oracle="diffusers has a script that downloads; tests/conversions/dit runs its main from a checkout",
    ),
)  # fmt: skip
