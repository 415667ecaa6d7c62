"""What the UNets' recipe reads off tensors, asks for, and refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from conversions.common.unet.recipe import UNET
from porter.core.checkpoint import Header
from porter.core.errors import RecipeError
from porter.core.recipe import compile_recipe
from tests.conversions.proofs.unet import PROOFS, REAL

TINY: Mapping[str, Mapping[str, Any]] = {proof.name.removeprefix("unet-"): proof.tiny for proof in PROOFS}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As config.json has it, without what is private."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def header(name: str, **changes: Any) -> dict[str, Any]:
    return dict(UNET.source_headers({**TINY[name], **changes}))


def infer(found: Header, **given: Any) -> dict[str, Any]:
    return plain(UNET.infer_config(found, given))


@pytest.mark.parametrize("name", REAL)
def test_what_released_models_have_is_named_and_never_taken(name: str) -> None:
    """Another model of these sizes may have other heads, and would compute something else without a word."""
    real = plain(REAL[name].config)
    found = UNET.source_headers(real, "F16")
    with pytest.raises(RecipeError, match="the tensors do not say") as error:
        UNET.infer_config(found, {})
    assert "released models of these sizes have {" in str(error.value.hint)
    kept = ("addition_embed_type", "class_embed_type", "addition_time_embed_dim", "only_cross_attention")
    given = {key: real[key] for key in ("attention_head_dim", *(key for key in kept if real.get(key)))}
    full = UNET.infer_config(found, given)
    assert plain(full) == real
    compile_recipe(UNET, full, found)


@pytest.mark.parametrize("channels", [5, 8, 9])
def test_more_channels_in_are_another_variant_of_the_same(channels: int) -> None:
    real = plain({**REAL["Stable Diffusion 1.5"].config, "in_channels": channels})
    assert infer(UNET.source_headers(real), attention_head_dim=8) == real


def test_what_is_given_is_taken() -> None:
    real = REAL["Stable Diffusion 1.5"]
    found = UNET.source_headers(real.config)
    assert infer(found, attention_head_dim=16, sample_size=32) == {
        **plain(real.config), "attention_head_dim": 16, "sample_size": 32,
    }  # fmt: skip
    assert infer(found, num_heads=16)["attention_head_dim"] == 16


def test_a_config_json_of_the_class_means_the_class_s_defaults() -> None:
    given = {"_class_name": "UNet2DConditionModel"}
    assert infer(header("1"), **given)["attention_head_dim"] == 8
    assert UNET.infer_config(header("1"), {**given, "block_out_channels": [32, 64, 96]})["sample_size"] is None


@pytest.mark.parametrize(
    ("name", "given", "asked"),
    [
        ("1", {}, "attention_head_dim"),
        ("2-unclip", {"attention_head_dim": 1}, "label_emb"),
        ("xl-base", {"attention_head_dim": 4, "addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ],
)
def test_what_no_tensor_says_is_asked_for(name: str, given: Mapping[str, Any], asked: str) -> None:
    with pytest.raises(RecipeError, match=asked):
        infer(header(name), **given)


def test_where_the_text_is_as_wide_as_a_level_the_tensors_do_not_say_what_is_attended_to() -> None:
    found = header("1", cross_attention_dim=64)
    with pytest.raises(RecipeError, match="only_cross_attention"):
        infer(found, attention_head_dim=4)
    assert infer(found, attention_head_dim=4, only_cross_attention=False)["only_cross_attention"] is False


def test_a_list_of_levels_says_nothing_of_the_middle() -> None:
    for value in ([True, True, True], True):
        found = header("1", only_cross_attention=value)
        full = UNET.infer_config(found, {"attention_head_dim": 4})
        assert full["only_cross_attention"] == value
        compile_recipe(UNET, full, found)


def test_one_value_for_all_levels_may_be_said_for_each() -> None:
    given = {**TINY["1"], "layers_per_block": [2, 2, 2], "cross_attention_dim": [24, 24, 24],
             "transformer_layers_per_block": [1, 1, 1], "attention_head_dim": [4, 4, 4]}  # fmt: skip
    full = UNET.infer_config(header("1"), given)
    assert plain(full) == plain(given)
    assert len(compile_recipe(UNET, full, header("1")).targets) == len(header("1"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_head_dim": 5}, "does not divide"),
        ({"attention_head_dim": [4, 4]}, "does not divide"),
        ({"attention_head_dim": 0}, "does not divide"),
        ({"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim: None"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim: None"),
        ({"norm_num_groups": 16}, "norm_num_groups: 32"),
        ({"act_fn": "gelu"}, "act_fn: silu"),
        ({"layers_per_block": [2, 2, 1]}, "layers_per_block does not fit"),
        ({"transformer_layers_per_block": [1, 2, 1]}, "transformer_layers_per_block does not fit"),
        ({"use_linear_projection": True}, "use_linear_projection does not fit"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "down_block_types does not fit"),
        ({"model_channels": 320}, "unknown key"),
        ({"_class_name": "UNet2DModel"}, "the config is of"),
    ],
)
def test_a_config_that_does_not_belong_to_the_file_is_refused(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        infer(header("1"), **{"attention_head_dim": 4, **given})


def test_levels_of_different_lengths_are_refused() -> None:
    whole = header("1")
    without = {name: info for name, info in whole.items() if name != "input_blocks.3.0.op.weight"}
    shorter = {name: info for name, info in whole.items() if not name.startswith("input_blocks.8.")}
    for found in (without, shorter):
        with pytest.raises(RecipeError, match="not of one length"):
            infer(found, attention_head_dim=4)


def test_tensors_of_something_else_are_refused_by_name() -> None:
    found = header("1")
    full = UNET.infer_config(found, {"attention_head_dim": 4})
    for extra, told in (
        (
            "input_blocks.2.1.transformer_blocks.1.norm1.weight",
            r"attentions\.1\.transformer_blocks\.1\.norm1",
        ),  # deeper
        ("label_emb.1.0.weight", r"no rule claims the source tensor: label_emb\.1\.0"),
        ("input_blocks.1.0.h_upd.weight", r"no rule claims the source tensor: input_blocks\.1\.0\.h_upd"),
    ):
        with pytest.raises(RecipeError, match=told):
            compile_recipe(UNET, full, {**found, extra: replace(found["out.0.weight"], name=extra)})
