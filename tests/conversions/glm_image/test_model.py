"""The native GLM-Image transformer against diffusers' class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.glm_image.model import GlmImageParams, GlmImageTransformer
from porter.core.errors import BadInputError
from runtime.loader import packed
from runtime.quality import at_quality

ROUNDING = 1e-6  # times max(1, max |reference|), float32
TINY = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "text_embed_dim": 24,
    "time_embed_dim": 20,
    "condition_dim": 10,
    "prior_vq_quantizer_codebook_size": 50,
}
VARIANTS = {
    "patch 2": {},
    "patch 1": {"patch_size": 1},
    "other output": {"out_channels": 6, "num_layers": 1},
    "one wide head": {"attention_head_dim": 40, "num_attention_heads": 1},
}


def diffusers_model(**changes: Any) -> nn.Module:
    """diffusers' transformer with every parameter away from 0 and 1."""
    from diffusers import GlmImageTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = GlmImageTransformer2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def native_like(reference: nn.Module, **changes: Any) -> GlmImageTransformer:
    config = TINY | changes
    dtype = next(reference.parameters()).dtype
    model = GlmImageTransformer.from_config(config).to(dtype).eval()
    model.load_state_dict(packed(GlmImageTransformer, config, reference.state_dict()), strict=True)
    return model


def inputs(seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """Two pictures of 3 x 5 pairs of latents, seven text tokens, two times and sizes; some prior tokens left out."""
    draw = torch.Generator().manual_seed(seed)
    config = TINY | changes
    tokens = 6 * 10 // config["patch_size"] ** 2
    return {
        "hidden_states": torch.randn(2, 4, 6, 10, generator=draw).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=draw).to(dtype),
        "prior_token_id": torch.randint(50, (2, tokens), generator=draw),
        "prior_token_drop": torch.rand(2, tokens, generator=draw) > 0.7,
        "timestep": torch.tensor([998.0, 31.4]),
        "target_size": torch.tensor([[96.0, 160.0], [1024.0, 32.0]]).to(dtype),
        "crop_coords": torch.tensor([[0.0, 0.0], [5.0, 70.0]]).to(dtype),
    }


@torch.no_grad()
def answers(native: nn.Module, reference: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return native(**given), reference(**given, return_dict=False)[0]


def gap(native: nn.Module, reference: nn.Module, given: dict[str, Tensor]) -> float:
    """max |difference| over max(1, max |reference|)."""
    ours, theirs = answers(native, reference, given)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_diffusers_up_to_rounding_and_in_every_bit_where_exact(changes: dict[str, Any]) -> None:
    reference = diffusers_model(**changes)
    native = native_like(reference, **changes)
    for seed in range(3):
        given = inputs(seed, **changes)
        assert gap(native, reference, given) < ROUNDING
        with at_quality("exact"):
            assert torch.equal(*answers(native, reference, given))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_diffusers_in_float64_and_bfloat16(changes: dict[str, Any]) -> None:
    for dtype, allowed in ((torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        reference = diffusers_model(**changes).to(dtype)
        native = native_like(reference, **changes)
        given = inputs(0, dtype, **changes)
        assert gap(native, reference, given) < allowed, dtype
        with at_quality("exact"):
            assert torch.equal(*answers(native, reference, given)), dtype


def test_names_and_shapes_are_those_of_diffusers_at_real_size() -> None:
    from diffusers import GlmImageTransformer2DModel

    real = TINY | {
        "in_channels": 16, "out_channels": 16, "num_layers": 30, "attention_head_dim": 128, "num_attention_heads": 32,
        "text_embed_dim": 1472, "time_embed_dim": 512, "condition_dim": 256, "prior_vq_quantizer_codebook_size": 16384,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = GlmImageTransformer2DModel(**real)
        config = dict(theirs.config)
        ours = GlmImageTransformer.from_config({"_class_name": "GlmImageTransformer2DModel", **config})
        given = packed(GlmImageTransformer, config, theirs.state_dict())
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in (ours.state_dict(), given)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def _swapped_final(model: GlmImageTransformer) -> None:
    weight = model.norm_out.linear.weight
    weight.data = weight.data.roll(len(weight) // 2, 0)


def _activated_twice(model: GlmImageTransformer) -> None:
    model.norm_out.linear.register_forward_pre_hook(lambda module, args: (nn.functional.silu(args[0]),))


def _streams_swapped(model: GlmImageTransformer) -> None:
    model.transformer_blocks[0].norm1.register_forward_hook(
        lambda module, args, out: ((out[0][0], *out[1][1:]), (out[1][0], *out[0][1:]))
    )


def _interleaved_rotary(model: GlmImageTransformer) -> None:
    rotary = model.rotary
    model.rotary = lambda *size: tuple(  # type: ignore[method-assign]
        t.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for t in rotary(*size)
    )


def _turned_grid(model: GlmImageTransformer) -> None:
    rotary = model.rotary
    model.rotary = lambda height, width, device: rotary(width, height, device)  # type: ignore[method-assign]


def _tanh_glyphs(model: GlmImageTransformer) -> None:
    model.glyph_projector.net[1].approximate = "tanh"


def _eps(model: GlmImageTransformer) -> None:
    model.transformer_blocks[1].norm2.eps = 1e-6


def _no_query_norm(model: GlmImageTransformer) -> None:
    model.transformer_blocks[2].attn1.norm_q = nn.Identity()


def _swapped_q_k(model: GlmImageTransformer) -> None:
    weight = model.transformer_blocks[0].attn1.to_qkv.weight
    q, k, v = weight.data.chunk(3)
    weight.data = torch.cat((k, q, v))


def _nothing_dropped(model: GlmImageTransformer) -> None:
    forward = model.forward
    model.forward = lambda prior_token_drop, **rest: forward(  # type: ignore[method-assign]
        prior_token_drop=torch.zeros_like(prior_token_drop), **rest
    )


def _sizes_swapped(model: GlmImageTransformer) -> None:
    model.time_condition_embed.register_forward_pre_hook(lambda module, args: (args[0], args[2], args[1], args[3]))


FAULTS = [
    _swapped_final, _activated_twice, _streams_swapped, _interleaved_rotary, _turned_grid, _tanh_glyphs, _eps,
    _no_query_norm, _swapped_q_k, _nothing_dropped, _sizes_swapped,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_planted_faults_exceed_rounding(fault: Callable[[GlmImageTransformer], None]) -> None:
    reference = diffusers_model()
    native = native_like(reference)
    fault(native)
    assert gap(native, reference, inputs(0)) > 2 * ROUNDING


def test_every_input_matters() -> None:
    native = native_like(diffusers_model())
    given = inputs(0)
    with torch.no_grad():
        plain = native(**given)
        for name, tensor in given.items():
            moved = torch.roll(tensor, 1, -1) if tensor.ndim > 1 else tensor + 1.0
            assert (native(**given | {name: moved}) - plain).abs().max() > 1e-4, name


def test_a_rotary_table_given_equals_the_size() -> None:
    native = native_like(diffusers_model())
    given = inputs(0)
    with torch.no_grad():
        assert torch.equal(native(**given, rotary=native.rotary(6, 10, torch.device("cpu"))), native(**given))


def test_a_batch_of_prompts_of_different_length_equals_each_alone() -> None:
    reference = diffusers_model()
    native = native_like(reference)
    given = inputs(0)
    mask = torch.tensor([[True] * 7, [False] * 4 + [True] * 3])  # padding stands in front, as in diffusers' pipeline
    with torch.no_grad():
        together = native(**given, attention_mask=mask)
        for row, length in ((0, 7), (1, 3)):
            alone = {name: tensor[row : row + 1] for name, tensor in given.items()}
            alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, 7 - length :]
            assert (together[row] - native(**alone)[0]).abs().max() < 5 * ROUNDING
            assert gap(native, reference, alone) < ROUNDING
        assert (together[1] - native(**given)[1]).abs().max() > 1e-3  # the mask is not for nothing
        padded = given["encoder_hidden_states"].masked_fill(~mask[..., None], 9.0)
        again = native(**given | {"encoder_hidden_states": padded}, attention_mask=mask)
        assert (again - together).abs().max() < 5 * ROUNDING  # whatever stands in the padding


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": None}, "num_layers"),
        ({"sample_size": 128}, "sample_size"),
        ({"attention_head_dim": 18}, "attention_head_dim"),
        ({"time_embed_dim": 21}, "time_embed_dim"),
        ({"condition_dim": True}, "condition_dim"),
        ({"patch_size": 0}, "patch_size"),
        ({"num_attention_heads": "3"}, "num_attention_heads"),
    ],
    ids=str,
)
def test_a_config_that_is_not_glm_image_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(BadInputError, match=named):
        GlmImageParams.from_config(config)


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.glm_image.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
