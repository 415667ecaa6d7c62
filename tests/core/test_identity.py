"""A component of which a recipe changes no name: what the class at its released size says of what must be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from porter.core.architectures import architectures
from porter.core.checkpoint import TensorInfo, read_header, spec
from porter.core.errors import RecipeError
from porter.core.identity import check_whole, for_header
from tests.conversions.test_recipes import PROOFS

transformers = pytest.importorskip("transformers")
T5 = "encoder.block.{}.layer."


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorInfo]:
    """The real class at another depth and width than the released one."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu", vocab_size=50
    )
    folder: Path = tmp_path_factory.mktemp("t5")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return read_header(folder / "model.safetensors")[0]


def test_whole_components_pass(t5: dict[str, TensorInfo]) -> None:
    """Every class that a recipe writes, small and as released: none is refused."""
    check_whole("text_encoder", t5)
    headers = [p.load().target_headers(c, "F32") for p in PROOFS for c in (p.tiny, *(r.config for r in p.real))
               if "without-norm3" not in p.name]  # fmt: skip
    assert len(headers) > 50
    for header in headers:
        check_whole("it", header)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (T5.format(1) + "0.SelfAttention.q.weight", "encoder.block.1.layer.{}.SelfAttention.q.weight is missing"),
        (T5.format(2) + "1.layer_norm.weight", "encoder.block.2.layer.{}.layer_norm.weight is missing"),
        ("encoder.block.1.", "encoder.block.1 is missing"),
        ("encoder.final_layer_norm.weight", "encoder.final_layer_norm.weight is missing"),
        ("shared.weight", "shared.weight is missing"),
    ],
)
def test_what_is_missing_is_named(gone: str, words: str, t5: dict[str, TensorInfo]) -> None:
    with pytest.raises(RecipeError, match="whole T5EncoderModel") as error:
        check_whole("text_encoder", {name: info for name, info in t5.items() if not name.startswith(gone)})
    assert words in str(error.value.found) and "--recipe" in str(error.value.hint)


def test_odd_shapes_and_dtypes_are_named(t5: dict[str, TensorInfo]) -> None:
    name = T5.format(1) + "1.DenseReluDense.wo.weight"
    with pytest.raises(RecipeError) as error:
        check_whole("text_encoder", t5 | {name: spec("F32", (48, 32))})
    assert f"{name} has the shape [48, 32], its siblings [32, 48]" in str(error.value.found)
    with pytest.raises(RecipeError) as error:
        check_whole("text_encoder", t5 | {name: spec("I8", (32, 48))})
    assert f"{name} is of I8" in str(error.value.found)


def test_what_the_class_has_is_not_claimed(t5: dict[str, TensorInfo]) -> None:
    recipe = for_header(t5, "original", "diffusers")
    assert recipe.knows_sources and not recipe.knows_targets


def test_unknown_tensors_are_not_judged() -> None:
    assert all("nothing.like.it" not in known.recorded for known in architectures())
    check_whole("it", {"nothing.like.it": spec("F32", (2,))})
