"""Lumina-Image 2.0: what the config must say, the unused norm, and faults that parity must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conversions.lumina2.case import CASES, DIFFUSERS
from conversions.lumina2.recipe import TRANSFORMER
from conversions.record_reference import write_weights
from parity.component import ComponentResult, compare_component
from parity.run import alignment_of
from parity.trace import Trace
from porter.core.convert import convert
from porter.core.errors import RecipeError
from porter.core.recipe import compile_recipe
from tests.conversions.proofs.lumina2 import PROOFS

(CASE,) = CASES.components
TINY = PROOFS[0].tiny
HEADER = TRANSFORMER.source_headers(TINY)
GIVEN: dict[str, Any] = {
    "patch_size": 2, "norm_eps": 1e-5, "axes_dims": [4, 2, 2], "multiple_of": 40, "ffn_dim_multiplier": 0.75,
}  # fmt: skip


def test_what_no_tensor_shows_is_asked_for() -> None:
    with pytest.raises(RecipeError, match="do not say patch_size and norm_eps and axes_dim_rope"):
        TRANSFORMER.infer_config(HEADER, {})
    released = TRANSFORMER.source_headers(PROOFS[0].real[0].config)
    with pytest.raises(RecipeError) as refused:
        TRANSFORMER.infer_config(released, {})
    assert refused.value.hint and '"axes_dim_rope": [32, 32, 32]' in refused.value.hint
    full = TRANSFORMER.infer_config(released, {"_class_name": "Lumina2Transformer2DModel"})
    assert (full["patch_size"], full["norm_eps"], full["multiple_of"]) == (2, 1e-5, 256)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"patch_size": 5}, "patch_size does not fit"),
        ({"patch_size": 0}, "patch_size does not fit"),
        ({"axes_dims": [4, 4, 4]}, "axes_dim_rope does not fit"),
        ({"axes_dims": "422"}, "axes_dim_rope does not fit"),
        ({"multiple_of": 256}, "do not make the feed-forward"),
        ({"multiple_of": 0}, "do not make the feed-forward"),
        ({"ffn_dim_multiplier": None}, "do not make the feed-forward"),
        ({"ffn_dim_multiplier": float("nan")}, "do not make the feed-forward"),
        ({"n_kv_heads": None}, "num_kv_heads does not fit"),  # null is: as many as heads
        ({"out_channels": 6}, "out_channels does not fit"),
        ({"qk_norm": False}, "cannot express qk_norm"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TRANSFORMER.infer_config(HEADER, {**GIVEN, **changed})


def test_what_null_means_in_a_config() -> None:
    alike = {**TINY, "num_kv_heads": 6}
    full = TRANSFORMER.infer_config(TRANSFORMER.source_headers(alike), {**alike, "num_kv_heads": None})
    assert full["num_kv_heads"] == 6
    assert TRANSFORMER.infer_config(HEADER, {**GIVEN, "out_channels": None})["out_channels"] == 3


@pytest.mark.parametrize(
    "rows", [48, 49, 48 + 2 * 8 * 4, 48 + 2 * 8 * 7], ids=["no keys", "half a head", "no divisor", "more than heads"]
)
def test_groups_that_do_not_divide_the_heads_are_refused(rows: int) -> None:
    name = "layers.0.attention.qkv.weight"
    broken = {**HEADER, name: replace(HEADER[name], shape=(rows, 48))}
    with pytest.raises(RecipeError, match="the heads do not fill"):
        TRANSFORMER.infer_config(broken, GIVEN)


def test_the_unused_norm_is_dropped_where_it_stands() -> None:
    for stands, exactness in ((True, "needs-base"), (False, "exact")):
        header = {name: info for name, info in HEADER.items() if stands or name != "norm_final.weight"}
        config = TRANSFORMER.infer_config(header, GIVEN)
        plan = compile_recipe(TRANSFORMER, config, header)
        assert config["_norm_final"] is stands and plan.exactness == exactness


def _swapped(first: str, second: str) -> Callable[[nn.Module], None]:
    def fault(module: nn.Module) -> None:
        state = dict(module.named_parameters())
        with torch.no_grad():
            kept = state[first].clone()
            state[first].copy_(state[second])
            state[second].copy_(kept)

    return fault


def _epsilon(module: nn.Module) -> None:
    """What the original takes without apex."""
    module.get_submodule("layers.1.attn.norm_k").eps = 1e-6  # type: ignore[assignment]


FAULTS = {
    "none": lambda module: None,
    "keys and values": _swapped("layers.0.attn.to_k.weight", "layers.0.attn.to_v.weight"),
    "norms of queries and keys": _swapped("layers.1.attn.norm_q.weight", "layers.1.attn.norm_k.weight"),
    "gate and up": _swapped(
        "context_refiner.1.feed_forward.linear_1.weight", "context_refiner.1.feed_forward.linear_3.weight"
    ),
    "the norms' places": _swapped("noise_refiner.0.norm2.weight", "noise_refiner.0.ffn_norm2.weight"),
    "the keys' epsilon": _epsilon,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_finds_faults(fault: str, tmp_path: Path) -> None:
    config = write_weights(CASE.trace, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / "port", component="transformer", config=config)
    port = tmp_path / "port" / "transformer"
    module = DIFFUSERS.load(port)
    FAULTS[fault](module)
    result = ComponentResult(CASE.component, "trace", DIFFUSERS.name, "")
    compare_component(module, DIFFUSERS, Trace.open(CASE.trace), alignment_of(CASE, port), result)
    assert result.passed == (fault == "none"), (result.status, result.guilty)
    assert result.counts["compared"] > 100
