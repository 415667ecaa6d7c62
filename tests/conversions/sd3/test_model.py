"""The native transformer of Stable Diffusion 3 against diffusers' class; against the original code stands its trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.sd3.model import SD3Transformer
from conversions.sd3.params import SD3Params
from porter.core.checkpoint import ANY, spec
from porter.core.errors import BadInputError, UsageError
from porter.core.execute import apply
from porter.core.onload import compile_on_load, on_disk
from porter.core.patterns import Pattern
from porter.core.recipe import INPUTS, OUTPUTS
from runtime.loader import load_module, packed
from runtime.quality import at_quality

ROUNDING = 1e-6  # times max(1, max |reference|), float32
TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 5,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "out_channels": 5,
    "pos_embed_max_size": 7,
}
MEDIUM: dict[str, Any] = {}
LARGE_35: dict[str, Any] = {"qk_norm": "rms_norm"}
MEDIUM_35: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
LAST_DUAL: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (2,), "num_layers": 3}
VARIANTS = pytest.mark.parametrize(
    "variant", [MEDIUM, LARGE_35, MEDIUM_35, LAST_DUAL], ids=["medium", "3.5 large", "3.5 medium", "last dual"]
)


def diffusers_model(**changes: Any) -> nn.Module:
    """diffusers' transformer with every parameter away from 0 and 1."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model: nn.Module = SD3Transformer2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def native_like(reference: nn.Module, **changes: Any) -> SD3Transformer:
    model = SD3Transformer.from_config(TINY | changes).eval()
    model.load_state_dict(packed(SD3Transformer, TINY | changes, reference.state_dict()), strict=True)
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another type; diffusers' own `to` warns."""
    return nn.Module.to(deepcopy(model), dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two images of 4 x 3 patches, five text tokens, two timesteps."""
    draw = torch.Generator().manual_seed(seed)
    random = {
        "hidden_states": torch.randn(2, 5, 8, 6, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
        "pooled_projections": torch.randn(2, 20, generator=draw),
    }
    return {k: t.to(dtype) for k, t in random.items()} | {"timestep": torch.tensor([937.5, 210.0])}


@torch.no_grad()
def gap(native: nn.Module, reference: nn.Module, given: dict[str, Tensor], **more: Any) -> float:
    """max |difference| over max(1, max |reference|)."""
    theirs = reference(**given, **more, return_dict=False)[0]
    return float((native(**given, **more) - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@VARIANTS
def test_equals_diffusers(variant: dict[str, Any]) -> None:
    reference = diffusers_model(**variant)
    native = native_like(reference, **variant)
    assert 0 < max(gap(native, reference, inputs(seed)) for seed in range(3)) < ROUNDING  # 0: not two codes
    half = cast(native, torch.bfloat16), cast(reference, torch.bfloat16)
    assert half[0](**inputs(0, torch.bfloat16)).dtype == torch.bfloat16
    assert gap(*half, inputs(0, torch.bfloat16)) < 2e-2


@VARIANTS
def test_equals_diffusers_a_million_times_closer_in_float64(variant: dict[str, Any]) -> None:
    reference = cast(diffusers_model(**variant), torch.float64)
    native = cast(native_like(diffusers_model(**variant), **variant), torch.float64)
    for module in list(reference.modules()):  # diffusers' own norm has a float32 island; torch's has none
        for name, norm in module.named_children():
            if type(norm).__name__ == "RMSNorm":
                wide = nn.RMSNorm(norm.dim, norm.eps, dtype=torch.float64)
                wide.weight = norm.weight
                setattr(module, name, wide)
    assert gap(native, reference, inputs(0, torch.float64)) < 1e-14


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_exact_is_equal_in_every_bit(variant: dict[str, Any], dtype: torch.dtype) -> None:
    reference = diffusers_model(**variant)
    native, reference = cast(native_like(reference, **variant), dtype), cast(reference, dtype)
    with at_quality("exact"):
        assert gap(native, reference, inputs(0, dtype)) == 0
        assert gap(native, reference, inputs(1, dtype), skip_layers=[1]) == 0


@pytest.mark.parametrize("size", [(14, 14), (2, 2), (4, 12), (10, 6)], ids=str)
def test_positions_are_cropped_from_the_middle(size: tuple[int, int]) -> None:
    reference = diffusers_model()
    native = native_like(reference)
    given = inputs(0) | {"hidden_states": torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(4))}
    assert gap(native, reference, given) < ROUNDING
    positions = native.pos_embed.positions(*size)
    assert torch.equal(native(**given, positions=positions), native(**given))
    assert not torch.equal(native(**given, positions=positions.roll(1, 2)), native(**given))


def test_a_picture_beyond_the_positions_is_refused() -> None:
    given = inputs(0) | {"hidden_states": torch.zeros(2, 5, 8, 16)}
    with pytest.raises(UsageError, match="larger than") as caught:
        native_like(diffusers_model())(**given)
    assert "7 x 7" in str(caught.value.expected) and "4 x 8" in str(caught.value.found)


@VARIANTS
@pytest.mark.parametrize("skipped", [[0], [1, 2], [2]], ids=str)
def test_skipped_layers_equal_diffusers(variant: dict[str, Any], skipped: list[int]) -> None:
    reference = diffusers_model(**variant)
    native = native_like(reference, **variant)
    assert gap(native, reference, inputs(0), skip_layers=skipped) < ROUNDING
    assert not torch.allclose(native(**inputs(0), skip_layers=skipped), native(**inputs(0)), atol=1e-2)


@VARIANTS
def test_each_picture_of_a_batch_is_as_alone(variant: dict[str, Any]) -> None:
    native, given = native_like(diffusers_model(**variant), **variant), inputs(0)
    with torch.no_grad():
        both = native(**given)
        for i in range(2):
            alone = native(**{name: tensor[i : i + 1] for name, tensor in given.items()})
            assert (both[i : i + 1] - alone).abs().max() < 5 * ROUNDING


# transformer/config.json of the released models, without what diffusers notes
RELEASED = {
    "medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    "3.5-medium": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    },
    "3.5-large": {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}  # fmt: skip
SHARED = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "out_channels": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_at_real_size(name: str) -> None:
    from diffusers import SD3Transformer2DModel

    config = SHARED | RELEASED[name]
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**config).state_dict()
        ours = SD3Transformer.from_config({"_class_name": "SD3Transformer2DModel", **config}).state_dict()
    plan = compile_on_load(
        SD3Transformer.on_load, config, {n: spec(ANY, tuple(t.shape), n) for n, t in theirs.items()},
        {n: spec(ANY, tuple(t.shape), n) for n, t in ours.items()},
    )  # fmt: skip
    assert {n: t.shape for n, t in apply(plan, theirs).items()} == {n: t.shape for n, t in ours.items()}
    assert sorted(n for parts in on_disk(SD3Transformer.on_load, config, ours).values() for n in parts) == sorted(
        theirs
    )


def test_the_loader_fills_it_from_a_folder(tmp_path: Path) -> None:
    reference: Any = diffusers_model(**MEDIUM_35)
    reference.save_pretrained(tmp_path)
    native = load_module(
        SD3Transformer, dict(reference.config), tmp_path, dtype=torch.float32, device=torch.device("cpu")
    )
    assert gap(native, reference, inputs(0)) < ROUNDING


def test_what_tensor_parallel_ranks_share() -> None:
    reference = diffusers_model(**MEDIUM_35)
    found: dict[str, set[Any]] = {}
    for rule in SD3Transformer.on_load.rules:
        for _, values in Pattern(rule.sources[0]).find(reference.state_dict(), {}):
            for name in Pattern(rule.targets[0]).fill_all(values, {}):
                found.setdefault(name.rpartition(".")[0], set()).add(rule.shard)
    linears = {n for n, m in native_like(reference, **MEDIUM_35).named_modules() if isinstance(m, nn.Linear)}
    ends = {"to_qkv": OUTPUTS, "add_qkv_proj": OUTPUTS, "net.0.proj": OUTPUTS}
    ends |= {"to_out.0": INPUTS, "to_add_out": INPUTS, "net.2": INPUTS}
    assert found == {n: {shard} for n in linears for end, shard in ends.items() if n.endswith(end)}


def _swap_final(model: SD3Transformer) -> None:
    model.norm_out.scale_first = False


def _swap_last_context(model: SD3Transformer) -> None:
    model.transformer_blocks[2].norm1_context.scale_first = False


def _erf(model: SD3Transformer) -> None:
    model.transformer_blocks[0].ff.net[0].act.approximate = "none"


def _eps(model: SD3Transformer) -> None:
    model.transformer_blocks[1].norm2.eps = 1e-5


def _norm_eps(model: SD3Transformer) -> None:
    model.transformer_blocks[1].attn.norm_k.eps = 1e-4


def _no_bias(model: SD3Transformer) -> None:
    model.transformer_blocks[0].attn.add_qkv_proj.bias.data[:48].zero_()


def _swapped_q_k(model: SD3Transformer) -> None:
    weight = model.transformer_blocks[0].attn.to_qkv.weight.data
    weight[:96] = weight[:96].roll(48, 0)


def _swapped_norms(model: SD3Transformer) -> None:
    attn = model.transformer_blocks[0].attn
    attn.norm_q, attn.norm_added_q = attn.norm_added_q, attn.norm_q


def _crop_from_the_corner(model: SD3Transformer) -> None:
    model.pos_embed.positions = (
        lambda h, w: (  # type: ignore[method-assign]
            model.pos_embed.pos_embed.unflatten(1, (7, 7))[:, : h // 2, : w // 2].flatten(1, 2)
        )
    )


def _dual_from_the_joint_s_input(model: SD3Transformer) -> None:
    norm = model.transformer_blocks[0].norm1
    norm.register_forward_hook(lambda m, a, out: (*out[:5], out[0], out[6]))


def _patches_channels_outermost(model: SD3Transformer) -> None:
    model.proj_out.register_forward_hook(lambda m, a, x: x.unflatten(-1, (5, 4)).mT.flatten(-2))


FAULTS = [
    _swap_final, _swap_last_context, _erf, _eps, _norm_eps, _no_bias, _swapped_q_k, _swapped_norms,
    _crop_from_the_corner, _dual_from_the_joint_s_input, _patches_channels_outermost,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_planted_faults_exceed_rounding(fault: Callable[[SD3Transformer], None]) -> None:
    reference = diffusers_model(**MEDIUM_35)
    native = native_like(reference, **MEDIUM_35)
    fault(native)
    with at_quality("exact"):  # without the fault: 0
        assert gap(native, reference, inputs(0)) > 2 * ROUNDING


@VARIANTS
def test_every_input_matters(variant: dict[str, Any]) -> None:
    native, given = native_like(diffusers_model(**variant), **variant), inputs(0)
    with torch.no_grad():
        plain = native(**given)
        for name, tensor in given.items():
            moved = tensor + (torch.arange(tensor.numel()).reshape(tensor.shape) % 3 == 1) * 0.5
            assert (native(**given | {name: moved}) - plain).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"theta": 500}, "theta"),
        ({"num_layers": None}, "num_layers"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"pos_embed_max_size": 0}, "pos_embed_max_size"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"caption_projection_dim": 40}, "caption_projection_dim"),
        ({"dual_attention_layers": [0, 3]}, "dual_attention_layers"),
        ({"dual_attention_layers": 1}, "dual_attention_layers"),
        ({"num_layers": "3"}, "num_layers"),
        ({"patch_size": True}, "patch_size"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(BadInputError, match=named):
        SD3Params.from_config(config)


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.sd3.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
