"""The native FLUX.1 transformer against diffusers' class and, with a checkout, against the original code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.flux1.model import FluxParams, FluxTransformer
from porter.core.errors import BadInputError
from runtime.loader import packed
from runtime.quality import at_quality

ROUNDING = 1e-6  # times max(1, max |reference|), float32
TINY = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def diffusers_model(**changes: Any) -> nn.Module:
    """diffusers' transformer with every parameter away from 0 and 1."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = FluxTransformer2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def native_like(reference: nn.Module, **changes: Any) -> FluxTransformer:
    model = FluxTransformer.from_config(TINY | changes).eval()
    model.load_state_dict(packed(FluxTransformer, TINY | changes, reference.state_dict()), strict=True)
    return model


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two images of 3 x 4 patches, five text tokens, two timesteps and guidance scales."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    random = {
        "hidden_states": torch.randn(2, 12, 16, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
        "pooled_projections": torch.randn(2, 20, generator=draw),
        "timestep": torch.rand(2, generator=draw),
    }
    fixed = {"img_ids": grid, "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 0.0])}
    return {k: t.to(dtype) for k, t in random.items()} | fixed


@torch.no_grad()
def gap(native: nn.Module, reference: nn.Module, given: dict[str, Tensor]) -> float:
    """max |difference| over max(1, max |reference|)."""
    theirs = reference(**given, return_dict=False)[0]
    return float((native(**given) - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_diffusers_in_float32(seed: int) -> None:
    reference = diffusers_model()
    assert gap(native_like(reference), reference, inputs(seed)) < ROUNDING


def test_equals_diffusers_in_float64_and_bfloat16() -> None:
    reference = diffusers_model()
    native = native_like(reference)
    for dtype, allowed in ((torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        for model in (native, reference):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        given = inputs(0, dtype)
        assert native(**given).dtype == dtype
        assert gap(native, reference, given) < allowed, dtype


def test_exact_is_the_arithmetic_of_diffusers_in_every_bit() -> None:
    reference = diffusers_model()
    native, given = native_like(reference), inputs(3)
    with torch.no_grad(), at_quality("exact"):
        assert torch.equal(native(**given), reference(**given, return_dict=False)[0])
    for model in (native, reference):
        model.to(torch.bfloat16)
    given = inputs(3, torch.bfloat16)
    with torch.no_grad(), at_quality("exact"):
        assert torch.equal(native(**given), reference(**given, return_dict=False)[0])


def test_equals_diffusers_without_guidance() -> None:
    reference = diffusers_model(guidance_embeds=False)
    given = inputs(0)
    del given["guidance"]
    assert gap(native_like(reference, guidance_embeds=False), reference, given) < ROUNDING


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_names_and_shapes_are_those_of_diffusers_at_real_size(guidance: bool) -> None:
    from diffusers import FluxTransformer2DModel

    real = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
    }
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**real)
        ours = FluxTransformer.from_config({"_class_name": "FluxTransformer2DModel", **real})
    packed_theirs = packed(FluxTransformer, real, theirs.state_dict())  # on the meta device: shapes only
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in (ours.state_dict(), packed_theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == (11_901_408_320 if guidance else 11_891_178_560)
    assert ours.params.axes_dims_rope == (16, 56, 56)


def _swap_final(model: FluxTransformer) -> None:
    model.norm_out.scale_first = False


def _half_split(model: FluxTransformer) -> None:
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.register_forward_hook(lambda m, a, x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))


def _erf(model: FluxTransformer) -> None:
    model.single_transformer_blocks[0].act_mlp.approximate = "none"


def _eps(model: FluxTransformer) -> None:
    model.transformer_blocks[1].norm2.eps = 1e-5


def _no_bias(model: FluxTransformer) -> None:
    model.transformer_blocks[0].attn.to_qkv.bias.data[:48].zero_()  # q's


def _text_after_image(model: FluxTransformer) -> None:
    rotary = model.rotary
    model.rotary = lambda txt, img: rotary(img, txt)  # type: ignore[method-assign]


def _swapped_q_k(model: FluxTransformer) -> None:
    for parameter in model.transformer_blocks[0].attn.to_qkv.parameters():
        q, k, v = parameter.data.chunk(3)
        parameter.data = torch.cat([k, q, v])


FAULTS = [_swap_final, _half_split, _erf, _eps, _no_bias, _text_after_image, _swapped_q_k]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_planted_faults_exceed_rounding(fault: Callable[[FluxTransformer], None]) -> None:
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
            moved = tensor + (torch.arange(tensor.numel()).reshape(tensor.shape) % 3 == 1) * 0.5
            assert (native(**given | {name: moved}) - plain).abs().max() > 1e-4, name


def test_a_rotary_table_given_equals_the_ids() -> None:
    native = native_like(diffusers_model())
    given = inputs(0)
    table = native.rotary(given["txt_ids"], given["img_ids"])
    assert torch.equal(native(**given, rotary=table), native(**given))


def test_guidance_must_fit_the_config() -> None:
    given = inputs(0)
    del given["guidance"]
    with pytest.raises(ValueError, match="guidance_embeds is True"):
        native_like(diffusers_model())(**given)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"theta": 500}, "theta"),
        ({"axes_dims_rope": (4, 6, 8)}, "axes_dims_rope"),
        ({"patch_size": 2}, "patch_size"),
        ({"axes_dims_rope": None}, "axes_dims_rope"),
    ],
    ids=str,
)
def test_a_config_that_is_not_flux_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(BadInputError, match=named):
        FluxParams.from_config(config)


def test_a_config_without_a_key_is_refused_by_name() -> None:
    config = {key: value for key, value in TINY.items() if key != "num_layers"}
    with pytest.raises(BadInputError, match="num_layers"):
        FluxParams.from_config(config)


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.flux1.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --- against the original code ---------------------------------------------------------------------------------------


def original_package() -> Any:
    """The original's `flux.model`, without running its package's `__init__`."""
    root = os.environ.get("PORTER_REFERENCES")
    if not root or not (folder := Path(root) / "flux" / "src" / "flux").is_dir():
        pytest.skip("PORTER_REFERENCES does not name a folder with a checkout of `flux`")
    package = types.ModuleType("flux")
    package.__path__ = [str(folder)]
    sys.modules.setdefault("flux", package)
    return importlib.import_module("flux.model")


def by_hand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original names -> ours, written by hand; the recipe takes no part."""
    single = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
    single |= {f"modulation.lin.{p}": f"norm.linear.{p}" for p in ("weight", "bias")}
    single |= {f"linear2.{p}": f"proj_out.{p}" for p in ("weight", "bias")}
    out: dict[str, Tensor] = {}
    heads = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    double = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    qkv = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        if stem in heads:
            out[f"{heads[stem]}.{leaf}"] = tensor
        elif stem == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            out[f"norm_out.linear.{leaf}"] = torch.cat([scale, shift])
        elif name.startswith("double_blocks."):
            _, i, rest = stem.split(".", 2)
            if rest in qkv:
                for part, piece in zip(qkv[rest], tensor.chunk(3), strict=True):
                    out[f"transformer_blocks.{i}.attn.{part}.{leaf}"] = piece
            else:
                out[f"transformer_blocks.{i}.{double[rest]}.{leaf}"] = tensor
        else:
            _, i, rest = name.split(".", 2)
            block = f"single_transformer_blocks.{i}"
            if rest.startswith("linear1."):
                width = tensor.shape[0] // 7
                sizes = [width, width, width, 4 * width]
                targets = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                for part, piece in zip(targets, tensor.split(sizes), strict=True):
                    out[f"{block}.{part}.{leaf}"] = piece
            else:
                out[f"{block}.{single[rest]}"] = tensor
    return out


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_original_code(dtype: torch.dtype) -> None:
    package = original_package()
    params = package.FluxParams(
        in_channels=16,
        out_channels=16,
        vec_in_dim=20,
        context_in_dim=24,
        hidden_size=48,
        mlp_ratio=4.0,
        num_heads=3,
        depth=2,
        depth_single_blocks=3,
        axes_dim=[4, 6, 6],
        theta=10_000,
        qkv_bias=True,
        guidance_embed=True,
    )
    torch.manual_seed(0)
    original = package.Flux(params).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    native = FluxTransformer.from_config(TINY).eval()
    native.load_state_dict(by_hand(original.state_dict()), strict=True)
    native, original = native.to(dtype), original.to(dtype)
    given = inputs(0, dtype)
    with torch.no_grad():
        theirs = original(
            img=given["hidden_states"],
            img_ids=given["img_ids"].expand(2, -1, -1).to(dtype),
            txt=given["encoder_hidden_states"],
            txt_ids=given["txt_ids"].expand(2, -1, -1).to(dtype),
            timesteps=given["timestep"],
            y=given["pooled_projections"],
            guidance=given["guidance"].to(dtype),
        )
        ours = native(**given)
    # In float64 the original's own float32 casts of q, k and the sinusoids remain, as do ours.
    assert (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1) < ROUNDING
