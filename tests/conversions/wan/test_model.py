"""The native Wan transformer against diffusers' class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from conversions.wan.model import TextCache, WanTransformer
from conversions.wan.params import WanParams
from porter.core.checkpoint import spec
from porter.core.errors import BadInputError, UsageError
from porter.core.onload import compile_on_load
from porter.core.recipe import INPUTS, OUTPUTS
from runtime.attention import attention_backend
from runtime.loader import load_module, packed
from runtime.quality import at_quality
from tests.conversions.proofs.wan import TRANSFORMERS

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}  # times max(1, max |reference|)
TINY = {
    "patch_size": (1, 2, 3), "num_attention_heads": 3, "attention_head_dim": 20, "in_channels": 5, "out_channels": 4,
    "text_dim": 20, "freq_dim": 14, "ffn_dim": 44, "num_layers": 3, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-5, "image_dim": None, "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
}  # fmt: skip
PICTURE = {"image_dim": 28, "added_kv_proj_dim": 60}
VARIANTS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": PICTURE,
    "flf2v": {**PICTURE, "pos_embed_seq_len": 10},
    "ti2v": {},  # a time for each patch
    "without norm2": {"cross_attn_norm": False},
    "time patches": {"patch_size": (2, 1, 2), "out_channels": None},
}
S = 18  # patches of the videos below


def pair(**changes: Any) -> tuple[nn.Module, WanTransformer]:
    """diffusers' transformer with every parameter away from 0 and 1, and ours with the same weights."""
    torch.manual_seed(0)
    reference: nn.Module = WanTransformer3DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    native = WanTransformer.from_config(dict(reference.config)).eval()
    native.load_state_dict(packed(WanTransformer, reference.config, reference.state_dict()), strict=True)
    return reference, native


def inputs(variant: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    """Videos of 18 patches; with pictures 512 text tokens, as diffusers cannot do with others."""
    draw = torch.Generator().manual_seed(1)
    size = (2, 3, 12) if variant == "time patches" else (3, 4, 9)
    given = {
        "hidden_states": torch.randn(batch, 5, *size, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 512 if "image_dim" in VARIANTS[variant] else 7, 20, generator=draw),
    }
    if "image_dim" in VARIANTS[variant]:
        pictures = batch * (2 if variant == "flf2v" else 1)
        given["encoder_hidden_states_image"] = torch.randn(pictures, 5, 28, generator=draw)
    times = torch.rand(batch, S, generator=draw) * 1000 if variant == "ti2v" else torch.tensor([937.0, 12.5])[:batch]
    return {k: t.to(dtype) for k, t in given.items()} | {"timestep": times}


@torch.no_grad()
def gap(native: nn.Module, reference: nn.Module, given: dict[str, Tensor]) -> float:
    """max |difference| over max(1, max |reference|)."""
    theirs = reference(**given, return_dict=False)[0]
    return float((native(**given) - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_diffusers(variant: str, dtype: torch.dtype) -> None:
    reference, native = (model.to(dtype) for model in pair(**VARIANTS[variant]))
    given = inputs(variant, dtype)
    assert gap(native, reference, given) < ROUNDING[dtype]
    with at_quality("exact"):
        assert torch.equal(native(**given), reference(**given, return_dict=False)[0])


@pytest.mark.parametrize("variant", ["t2v", "flf2v", "ti2v"])
@torch.no_grad()
def test_loaded_in_bfloat16_it_is_diffusers_bit_by_bit(variant: str, tmp_path: Path) -> None:
    """Both keep the time's embedder and the modulations in float32. One video: of several, diffusers multiplies the
    text tokens as slices behind the pictures', which rounds once more before the bias."""
    theirs, _ = pair(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    for name, parameter in theirs.named_parameters():  # what from_pretrained does, where accelerate is installed
        if not set(theirs._keep_in_fp32_modules) & set(name.split(".")):  # type: ignore[arg-type]
            parameter.data = parameter.data.bfloat16()
    config, cpu = dict(theirs.config), torch.device("cpu")
    ours = load_module(WanTransformer, config, tmp_path, dtype=torch.bfloat16, device=cpu)
    kept = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, p in theirs.named_parameters() if p.dtype == torch.float32} and len(kept) > 10
    assert ours.dtype == torch.bfloat16
    given = inputs(variant, torch.bfloat16, batch=1)
    with at_quality("exact"):
        assert torch.equal(ours(**given), theirs(**given, return_dict=False)[0])
    assert gap(ours, theirs, given) < 2e-2


def test_the_text_of_any_length_and_each_video_of_a_batch_alone() -> None:
    """Without diffusers' fixed 512 tokens, and in a batch as alone."""
    _, native = pair(**VARIANTS["flf2v"])
    given = inputs("flf2v") | {"encoder_hidden_states": torch.randn(2, 6, 20)}
    with torch.no_grad():
        both = native(**given)
        for i in range(2):
            alone = {
                name: t[2 * i : 2 * i + 2] if name.endswith("image") else t[i : i + 1] for name, t in given.items()
            }
            assert (native(**alone) - both[i : i + 1]).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@torch.no_grad()
def test_what_one_prompt_leaves_is_computed_once(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, native = pair(**VARIANTS[variant])
    given = inputs(variant)
    first, later = given, given | {"timestep": given["timestep"] / 2}
    expected = [native(**each) for each in (first, later)]
    cache = TextCache()
    assert torch.equal(native(**first, cache=cache), expected[0])
    never = pytest.fail
    monkeypatch.setattr(native.condition_embedder, "embed", lambda *_: never("the text is embedded again"))
    for block in native.blocks:
        monkeypatch.setattr(block.attn2, "_keys", lambda *_: never("keys are computed again"))
    assert torch.equal(native(**later, cache=cache), expected[1])


@torch.no_grad()
def test_a_second_model_fills_the_cache_anew() -> None:
    (_, first), (_, second) = pair(), pair()
    for parameter in second.parameters():
        parameter.mul_(1.1)
    given, cache = inputs("t2v"), TextCache()
    first(**given, cache=cache)
    assert torch.equal(second(**given, cache=cache), second(**given))


@pytest.mark.parametrize("name", ["math", pytest.param("flex", marks=pytest.mark.slow), "flash"])
@torch.no_grad()
def test_every_backend_of_a_cpu_answers_the_same(name: str) -> None:
    """Attention to patches, text and pictures takes no mask."""
    _, native = pair(**VARIANTS["i2v"])
    given = inputs("i2v")
    expected = native(**given)
    with attention_backend(name, native.supported_attention_backends):
        assert (native(**given) - expected).abs().max() < 1e-5


def test_a_rotary_table_given_equals_the_latents() -> None:
    _, native = pair()
    given = inputs("t2v")
    table = native.rotary(given["hidden_states"].shape, torch.device("cpu"))
    assert torch.equal(native(**given, rotary=table), native(**given))


def test_a_video_beyond_the_positions_is_refused() -> None:
    _, native = pair(rope_max_seq_len=3)
    with pytest.raises(UsageError, match="larger than the model's positions"):
        native.rotary((1, 5, 4, 2, 3), torch.device("cpu"))


@pytest.mark.parametrize("real", [r for proof in TRANSFORMERS for r in proof.real], ids=lambda r: r.name)
def test_the_on_load_recipe_fills_the_real_models(real: Any) -> None:
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**real.config).state_dict()
        ours = WanTransformer.from_config(real.config).state_dict()
    source, target = ({n: spec("F32", tuple(t.shape), n) for n, t in state.items()} for state in (theirs, ours))
    plan = compile_on_load(WanTransformer.on_load, real.config, source, target)
    assert set(plan.targets) == set(ours)
    shared = {o.name: plan.rules[step.rule].shard for step in plan.steps for o in step.outputs}
    by_rank = {name.split(".", 2)[2] for name, shard in shared.items() if shard is not None}
    assert {n.rpartition(".")[0] for n in by_rank} >= {"attn1.to_qkv", "attn2.to_q", "attn2.to_kv", "attn1.norm_q"}
    assert shared["blocks.0.ffn.net.0.proj.weight"] == OUTPUTS and shared["blocks.0.ffn.net.2.weight"] == INPUTS
    assert shared["blocks.0.attn2.to_out.0.weight"] == INPUTS and shared["blocks.0.norm2.weight"] is None


def _swap_modulation(model: WanTransformer) -> None:
    model.blocks[1].scale_shift_table.data = model.blocks[1].scale_shift_table.data.roll(1, 1)


def _half_split(model: WanTransformer) -> None:
    for norm in (model.blocks[0].attn1.norm_q, model.blocks[0].attn1.norm_k):
        norm.register_forward_hook(
            lambda m, a, x: x.unflatten(-1, (3, 2, -1)).transpose(-1, -2).flatten(-3)  # another pairing of a head
        )


def _norm_per_head(model: WanTransformer) -> None:
    class PerHead(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            y = x.unflatten(-1, (3, -1))
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return y.flatten(-2) * self.norm.weight

    model.blocks[0].attn1.norm_q = PerHead(model.blocks[0].attn1.norm_q)


def _eps(model: WanTransformer) -> None:
    model.blocks[0].norm3.eps = 1e-4


def _erf(model: WanTransformer) -> None:
    model.condition_embedder.text_embedder.act.approximate = "none"


def _tanh(model: WanTransformer) -> None:
    model.condition_embedder.image_embedder.ff.net[0].act.approximate = "tanh"


def _no_picture(model: WanTransformer) -> None:
    attention = model.blocks[2].attn2
    keys = attention._keys
    attention._keys = lambda context: {k: v for k, v in keys(context).items() if "image" not in k}


def _swapped_k_v(model: WanTransformer) -> None:
    weight = model.blocks[0].attn2.to_kv.weight
    weight.data = weight.data.roll(60, 0)


def _axes(model: WanTransformer) -> None:
    rotary = model.rotary
    model.rotary = lambda shape, device: tuple(t.roll(2, -1) for t in rotary(shape, device))


FAULTS = [_swap_modulation, _half_split, _norm_per_head, _eps, _erf, _tanh, _no_picture, _swapped_k_v, _axes]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_planted_faults_exceed_rounding(fault: Callable[[WanTransformer], None]) -> None:
    reference, native = pair(**VARIANTS["i2v"])
    fault(native)
    assert gap(native, reference, inputs("i2v")) > 2 * ROUNDING[torch.float32]


@pytest.mark.parametrize("variant", ["flf2v", "ti2v"])
@torch.no_grad()
def test_every_input_matters(variant: str) -> None:
    _, native = pair(**VARIANTS[variant])
    given = inputs(variant)
    plain = native(**given)
    for name, tensor in given.items():
        moved = tensor + (torch.arange(tensor.numel()).reshape(tensor.shape) % 3 == 1) * 0.5
        assert (native(**given | {name: moved}) - plain).abs().max() > 1e-4, name


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_pictures_must_fit_the_config(variant: str) -> None:
    given = inputs(variant)
    given["encoder_hidden_states_image"] = torch.zeros(2, 5, 28)
    if variant == "i2v":
        del given["encoder_hidden_states_image"]
    with pytest.raises(ValueError, match=f"takes image tokens: {variant == 'i2v'}"):
        pair(**VARIANTS[variant])[1](**given)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window_size": [-1, -1]}, "window_size"),
        ({"num_layers": None}, "num_layers"),
        ({"qk_norm": "rms_norm"}, "not supported"),
        ({"image_dim": 28}, "not supported"),
        ({"image_dim": 28, "added_kv_proj_dim": 32}, "not supported"),
        ({"pos_embed_seq_len": 10}, "not supported"),
        ({"freq_dim": 15}, "not supported"),
        ({"patch_size": (2, 2)}, "not supported"),
    ],
    ids=str,
)
def test_a_config_that_the_model_cannot_do_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {**TINY, **change}
    if config["num_layers"] is None:
        del config["num_layers"]
    with pytest.raises(BadInputError, match=named):
        WanParams.from_config(config)


def test_a_config_from_before_the_positions_of_pictures_is_read() -> None:
    """Wan 2.1's T2V and I2V were released with configs that have no pos_embed_seq_len."""
    config = {key: value for key, value in TINY.items() if key != "pos_embed_seq_len"}
    assert WanParams.from_config(config) == WanParams.from_config(TINY)


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.wan.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
