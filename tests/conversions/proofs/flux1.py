"""FLUX.1's transformer: releases told by the channels that go in and by guidance."""

from __future__ import annotations

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

_DEV: Config = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
_TINY: Config = {
    **_DEV, "in_channels": 5, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 3, "joint_attention_dim": 7, "pooled_projection_dim": 6, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
_SCHNELL = {"guidance_embeds": False}
_CONTROL = {"in_channels": 128, "out_channels": 64}
_FILL = {"in_channels": 384, "out_channels": 64}


def _real(name: str, model: str, more: Config) -> Real:
    return Real(name, {**_DEV, **more}, Table("flux1", "Flux", model), Table("flux1", "FluxTransformer2DModel", model))


PROOFS = tuple(
    Proof(
        f"flux1-transformer-{name}", "conversions.flux1.recipe:TRANSFORMER", {**_TINY, **tiny},
        of_class("diffusers", "FluxTransformer2DModel"), real,
        no_oracle="diffusers' converter, of width 3072, in tests/conversions/flux1/test_recipe.py",
    )
    for name, tiny, real in (
        ("dev", {}, (_real("FLUX.1-dev, -Krea-dev and -Kontext-dev", "", {}),)),
        ("schnell", _SCHNELL, (_real("FLUX.1-schnell", "FLUX.1-schnell", _SCHNELL),)),
        (
            "wider-in-than-out", {"in_channels": 15, "out_channels": 4},
            (
                _real("FLUX.1-Fill-dev", "FLUX.1-Fill-dev", _FILL),
                _real("FLUX.1-Canny-dev and -Depth-dev", "FLUX.1-Canny-dev or FLUX.1-Depth-dev", _CONTROL),
            ),
        ),
    )
)  # fmt: skip
