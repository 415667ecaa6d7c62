"""Patterns match whole names only, and mean what they say."""

from __future__ import annotations

import pytest

from porter.core.errors import RecipeError
from porter.core.patterns import Pattern, count_blocks, evaluate, nearest, template


def test_matches_the_whole_name_only() -> None:
    pattern = Pattern("blocks.{i:int}.qkv.{p:weight|bias}")
    assert pattern.match("blocks.12.qkv.bias", {}) == {"i": 12, "p": "bias"}
    for name in (
        "x.blocks.1.qkv.bias", "blocks.1.qkv.bias.x", "blocks.1.qkvXbias", "blocks.01.qkv.bias", "blocks..qkv.bias",
        "blocks.1.qkv.scale", "blocks.-1.qkv.bias", "blocks.1.qkv.bias\n",
    ):  # fmt: skip
        assert pattern.match(name, {}) is None, name


def test_fills_indices_and_words() -> None:
    assert Pattern("up.{n-1-i}.{p}").fill({"i": 1, "p": "bias"}, {"n": 4}) == "up.2.bias"
    assert Pattern("up.{2*i+1}").fill({"i": 3}, {}) == "up.7"
    assert Pattern("up.{k//(l+1)}.{k%(l+1)}").fill({"k": 7}, {"l": 2}) == "up.2.1"
    with pytest.raises(RecipeError, match="negative index"):
        Pattern("up.{i-1}").fill({"i": 0}, {})
    with pytest.raises(RecipeError, match="cannot evaluate 'q'"):
        Pattern("up.{q}").fill({"i": 0}, {})


def test_bounded_indices() -> None:
    names = [f"b.{i}" for i in range(4)]
    found = {text: [name for name, _ in Pattern(text).find(names, {"n": 4})]
             for text in ("b.{i:int==n-1}", "b.{i:int<n-1}", "b.{i:int!=1}", "b.{i:int>=2}")}  # fmt: skip
    assert found == {
        "b.{i:int==n-1}": ["b.3"],
        "b.{i:int<n-1}": ["b.0", "b.1", "b.2"],
        "b.{i:int!=1}": ["b.0", "b.2", "b.3"],
        "b.{i:int>=2}": ["b.2", "b.3"],
    }


@pytest.mark.parametrize("text", ["a.{i}", "a.{i:int}.{i:int}", "a.{}", "a.{p:x|y}.{p:x}"])
def test_refuses_patterns_that_cannot_be_matched(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be matched"):
        Pattern(text).match("a.1", {})


def test_expressions() -> None:
    assert evaluate("4*h + (m - 1) // 2", {"h": 8, "m": 5}) == 34
    assert evaluate("(k - 1) % (l + 1)", {"k": 6, "l": 2}) == 2
    assert evaluate(7, {}) == 7
    for bad in ("h.x", "__import__('os')", "h**9", "1.5", "k", "h//0", "h%0", "h if h else 1", "", "p"):
        with pytest.raises(RecipeError, match="cannot evaluate"):
            evaluate(bad, {"h": 8, "p": "weight"})


def test_templates_blocks_and_neighbours() -> None:
    assert template("double_blocks.17.img_mlp.0.weight") == "double_blocks.*.img_mlp.*.weight"
    assert count_blocks(["b.0.x", "b.1.x", "b.2.y", "bb.7.x", "b.last"], "b") == 3
    assert count_blocks(["a.0"], "b") == 0
    with pytest.raises(RecipeError, match=r"b\.1 is missing"):
        count_blocks(["b.0.x", "b.2.x"], "b")
    assert nearest("img_attn.qkv.bias", ["txt_in.bias", "img_attn.qkv.weight"])[0] == "img_attn.qkv.weight"


@pytest.mark.parametrize("text", ["y.{k:each 200000}", "y.{k:each 0}.{j:each 3000000000}"])
def test_no_pattern_makes_names_without_end(text: str) -> None:
    """Also where one count of 0 would make none: the other alone would fill the memory."""
    with pytest.raises(RecipeError, match="too many names"):
        Pattern(text).fill_all({}, {})
