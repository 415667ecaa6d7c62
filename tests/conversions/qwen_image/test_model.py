"""The native Qwen-Image transformer against diffusers' class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.qwen_image.model import QwenImageParams, QwenImageTransformer
from parity.recorder import float64
from porter.core.errors import BadInputError, UsageError
from runtime.loader import packed
from runtime.quality import at_quality

ROUNDING = 1e-6  # times max(1, max |reference|), float32
TINY = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}
VARIANTS = {
    "base": {},
    "edit-2511": {"zero_cond_t": True},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
    "no out_channels": {"out_channels": None},
}
ONE = [(1, 3, 5)]  # odd sides: the larger half is above the centre
SEVERAL = [(1, 3, 5), (1, 4, 2), (1, 2, 2)]
SHAPES = {"base": (ONE, SEVERAL), "edit-2511": (ONE, SEVERAL), "layered": (ONE, SEVERAL), "no out_channels": (ONE,)}
CASES = [(name, shapes) for name, several in SHAPES.items() for shapes in several]


def diffusers_model(**changes: Any) -> nn.Module:
    """diffusers' transformer with every parameter away from 0 and 1."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = QwenImageTransformer2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def native_like(reference: nn.Module, **changes: Any) -> QwenImageTransformer:
    config = TINY | changes
    model = QwenImageTransformer.from_config(config).eval()
    model.load_state_dict(packed(QwenImageTransformer, config, reference.state_dict()), strict=True)
    return model


def inputs(shapes: list[tuple[int, int, int]], variant: str = "base", dtype: torch.dtype = torch.float32) -> Any:
    """Two images, texts of seven and four tokens, two timesteps."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(frames * rows * columns for frames, rows, columns in shapes)
    given = {
        "hidden_states": torch.randn(2, tokens, 12, generator=draw).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=draw).to(dtype),
        "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "timestep": torch.rand(2, generator=draw).to(dtype),
        "img_shapes": shapes,
    }
    return given | ({"additional_t_cond": torch.tensor([0, 1])} if variant == "layered" else {})


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `to` does, without diffusers' note about it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def run_theirs(reference: nn.Module, given: dict[str, Any]) -> Tensor:
    shapes = [given["img_shapes"]] * len(given["timestep"])
    out: Tensor = reference(**given | {"img_shapes": shapes}, return_dict=False)[0]
    return out


@torch.no_grad()
def gap(native: nn.Module, reference: nn.Module, given: dict[str, Any]) -> float:
    """max |difference| over max(1, max |reference|)."""
    theirs = run_theirs(reference, given)
    return float((native(**given) - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize(("variant", "shapes"), CASES, ids=lambda v: v if isinstance(v, str) else f"{len(v)} shapes")
def test_equals_diffusers(variant: str, shapes: list[tuple[int, int, int]]) -> None:
    """Up to rounding, which float64 makes a thousand times smaller; `exact` in every bit."""
    reference = diffusers_model(**VARIANTS[variant])
    native = native_like(reference, **VARIANTS[variant])
    given = inputs(shapes, variant)
    assert gap(native, reference, given) < ROUNDING
    with float64(native, reference):
        assert gap(native, reference, inputs(shapes, variant, torch.float64)) < 1e-13
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cast(native, dtype), cast(reference, dtype)
        given = inputs(shapes, variant, dtype)
        with at_quality("exact"), torch.no_grad():
            assert torch.equal(native(**given), run_theirs(reference, given)), dtype
    assert native(**given).dtype == torch.bfloat16
    assert gap(native, reference, given) < 3e-2


def test_prompts_of_different_lengths_equal_each_alone() -> None:
    native = native_like(diffusers_model())
    given = inputs(SEVERAL)
    together = native(**given)
    for i, length in enumerate((7, 4)):
        alone = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in given.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
        alone["encoder_hidden_states_mask"] = None
        assert (native(**alone) - together[i : i + 1]).abs().max() < ROUNDING * together.abs().max()


def test_names_and_shapes_on_disk_are_those_of_diffusers_at_real_size() -> None:
    """The config of the first release, with its key that the class never had."""
    from diffusers import QwenImageTransformer2DModel

    real = {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
        "patch_size": 2,
    }
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel.from_config(real)
        ours = QwenImageTransformer.from_config(real | {"pooled_projection_dim": 768})
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 20_430_401_088
    packed_names = {name for name, _ in ours.named_parameters()}
    kept = {name: p.shape for name, p in theirs.named_parameters() if name in packed_names}
    assert all(ours.get_parameter(name).shape == shape for name, shape in kept.items())
    gone = {name for name, _ in theirs.named_parameters()} - kept.keys()
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in gone} == {
        *(f"attn.to_{x}" for x in "qkv"),
        *(f"attn.add_{x}_proj" for x in "qkv"),
    }


def test_a_rotary_table_given_equals_the_shapes() -> None:
    native = native_like(diffusers_model())
    given = inputs(SEVERAL)
    assert torch.equal(native(**given, rotary=native.rotary(SEVERAL, 7)), native(**given))


@pytest.mark.parametrize("layered", [False, True])
def test_the_table_is_diffusers_in_every_bit(layered: bool) -> None:
    """Up to the edge of its 4096 positions, at the real widths of the axes."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope

    their_class = QwenEmbedLayer3DRope if layered else QwenEmbedRope
    theirs = their_class(10000, axes_dim=[16, 56, 56], scale_rope=True)
    config = TINY | {"axes_dims_rope": [16, 56, 56], "attention_head_dim": 128, "use_layer3d_rope": layered}
    native = QwenImageTransformer.from_config(config)
    for shapes in ([(1, 64, 48)], [(1, 2, 3)] * 5, [(2, 7, 9), (1, 90, 3)], [(1, 4, 2048), (1, 1, 1)]):
        if layered and shapes[-1][0] != 1:
            continue
        pictures, text = theirs([shapes], max_txt_seq_len=1024)
        cos, sin = native.rotary(shapes, 1024)
        assert torch.equal(torch.complex(cos, sin), torch.cat([text, pictures])), shapes


def test_more_positions_than_the_table_has_are_refused() -> None:
    native = QwenImageTransformer.from_config(TINY)
    assert native.rotary([(1, 2, 8)], 4092)[0].shape == (4092 + 16, 8)
    with pytest.raises(UsageError, match="do not fit the transformer's positions"):
        native.rotary([(1, 2, 8)], 4093)


def test_every_input_matters() -> None:
    native = native_like(diffusers_model(**VARIANTS["layered"]), **VARIANTS["layered"])
    given = inputs(SEVERAL, "layered")
    changes = {
        "img_shapes": [(1, 5, 3), *SEVERAL[1:]],
        "additional_t_cond": torch.tensor([1, 0]),
        "encoder_hidden_states_mask": None,
    }
    with torch.no_grad():
        plain = native(**given)
        for name, value in given.items():
            other = changes[name] if name in changes else value + (torch.arange(value.numel()).view_as(value) % 3) * 0.5
            assert (native(**given | {name: other}) - plain).abs().max() > 1e-4, name


# --- planted faults --------------------------------------------------------------------------------------------------


def _swap_final(model: QwenImageTransformer) -> None:
    model.norm_out.scale_first = False


def _erf(model: QwenImageTransformer) -> None:
    model.transformer_blocks[0].img_mlp.net[0].act.approximate = "none"


def _eps(model: QwenImageTransformer) -> None:
    model.transformer_blocks[0].img_norm1.eps = 1e-4


def _swapped_q_k(model: QwenImageTransformer) -> None:
    weight = model.transformer_blocks[0].attn.to_qkv.weight
    weight.data = torch.cat([weight[48:96], weight[:48], weight[96:]])


def _half_split(model: QwenImageTransformer) -> None:
    for block in model.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.register_forward_hook(lambda m, a, x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))


def _text_from_zero(model: QwenImageTransformer) -> None:
    rotary = model.rotary
    zero = lambda shapes, text: rotary([(1, 1, 1)], text)  # noqa: E731
    model.rotary = (
        lambda shapes, text: tuple(  # type: ignore[method-assign]
            torch.cat((z[:text], t[text:])) for z, t in zip(zero(shapes, text), rotary(shapes, text), strict=True)
        )
    )


def _no_mask(model: QwenImageTransformer) -> None:
    forward = model.forward
    model.forward = lambda **given: forward(**given | {"encoder_hidden_states_mask": None})  # type: ignore[method-assign]


def _no_zero_time(model: QwenImageTransformer) -> None:
    object.__setattr__(model.params, "zero_cond_t", False)


FAULTS = [_swap_final, _erf, _eps, _swapped_q_k, _half_split, _text_from_zero, _no_mask, _no_zero_time]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_planted_faults_exceed_rounding(fault: Callable[[QwenImageTransformer], None]) -> None:
    reference = diffusers_model(zero_cond_t=True)
    native = native_like(reference, zero_cond_t=True)
    fault(native)
    assert gap(native, reference, inputs(SEVERAL)) > 2 * ROUNDING


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"theta": 500}, {"axes_dims_rope": (4, 6, 8)}, {"axes_dims_rope": (5, 5, 6)},
                                    {"guidance_embeds": True}, {"zero_cond_t": True, "use_additional_t_cond": True},
                                    {"num_layers": None}], ids=str)  # fmt: skip
def test_a_config_that_is_not_qwen_image_is_refused_by_name(change: dict[str, Any]) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(BadInputError) as error:
        QwenImageParams.from_config(config)
    assert all(name in str(error.value) for name in change)


def test_the_additional_condition_must_fit_the_config() -> None:
    with pytest.raises(ValueError, match="use_additional_t_cond is False"):
        native_like(diffusers_model())(**inputs(ONE, "layered"))


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.qwen_image.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
