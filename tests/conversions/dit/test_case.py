"""DiT: where diffusers' class differs from the original, and diffusers' own script as an oracle."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conversions.dit.case import AS_IT_IS, CASES, CLASS, DIFFUSERS
from conversions.dit.recipe import TRANSFORMER
from conversions.record_reference import write_weights
from parity.case import Candidate
from parity.component import ComponentResult, compare_component
from parity.run import alignment_of
from parity.trace import Trace
from porter.core.convert import convert
from porter.core.errors import RecipeError
from tests.conversions.headers import differing, fingerprint, shapes_of, write
from tests.conversions.proofs import run

REFERENCES = os.environ.get("PORTER_REFERENCES")
(CASE,) = CASES.components


@pytest.fixture
def port(tmp_path: Path) -> Path:
    config = write_weights(CASE.trace, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / "port", config=config)
    return tmp_path / "port" / "transformer"


def compared(port: Path, candidate: Candidate, changed: Mapping[str, Any] | None = None) -> ComponentResult:
    """The candidate against the trace, after a change of the loaded module's tensors."""
    module = candidate.load(port)
    if changed:
        module.load_state_dict({**module.state_dict(), **changed})
    result = ComponentResult(CASE.component, "trace", candidate.name, "")
    return compare_component(module, candidate, Trace.open(CASE.trace), alignment_of(CASE, port), result)


def test_the_class_as_it_is_has_other_frequencies_of_the_time(port: Path) -> None:
    """What parity must go on saying until diffusers spaces them as the original does."""
    assert compared(port, DIFFUSERS).passed
    found = compared(port, AS_IT_IS)
    assert not found.passed and found.guilty and found.guilty.candidate.endswith("norm1.emb.time_proj")


def test_the_class_needs_the_originals_epsilon(port: Path) -> None:
    """The class's own default for the second norm is ten times the original's."""
    config = json.loads((port / "config.json").read_text())
    assert config.pop("norm_eps") == 1e-6
    (port / "config.json").write_text(json.dumps(config))
    assert not compared(port, DIFFUSERS).passed


def test_every_copy_of_an_embedder_is_compared(port: Path) -> None:
    name = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    table = load_file(port / "diffusion_pytorch_model.safetensors")[name.format(1)]
    for block in range(3):
        found = compared(port, DIFFUSERS, {name.format(block): table.flip(0)})
        assert not found.passed and any("another copy" in verdict.note for verdict in found.verdicts)


def test_heads_must_be_given_and_divide_the_width() -> None:
    header = TRANSFORMER.source_headers(TINY)
    with pytest.raises(RecipeError, match="num_attention_heads"):
        TRANSFORMER.infer_config(header, {})
    with pytest.raises(RecipeError, match="does not divide"):
        TRANSFORMER.infer_config(header, {"num_heads": 5})
    config = TRANSFORMER.infer_config(header, {"num_heads": 4})
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (4, 6)
    assert TRANSFORMER.infer_config(header, {**config, "norm_eps": 1e-5})["norm_eps"] == 1e-5
    assert config["_class_name"] == CLASS


TINY = {
    "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with checkouts")
def test_equal_to_diffusers_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its main, with our tensors for the download, up to the class that it loads them into. It has 28 blocks."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchvision.datasets.utils"].download_url = None  # type: ignore[attr-defined]
    path = Path(str(REFERENCES)) / "diffusers" / "scripts" / "convert_dit_to_diffusers.py"
    found = importlib.util.spec_from_file_location("convert_dit_to_diffusers", path)
    assert found and found.loader
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)

    class Loaded(Exception):
        pass

    def load_state_dict(state: dict[str, Tensor], strict: bool) -> None:
        theirs.update(state)
        raise Loaded

    theirs: dict[str, Tensor] = {}
    arrays = fingerprint(shapes_of(TRANSFORMER.source_headers(TINY)))
    monkeypatch.setattr(script, "download_model", lambda name: {n: torch.from_numpy(a) for n, a in arrays.items()})
    monkeypatch.setattr(script, "Transformer2DModel", lambda **config: SimpleNamespace(load_state_dict=load_state_dict))
    with pytest.raises(Loaded):
        script.main(SimpleNamespace(image_size=256))
    assert theirs.pop("pos_embed") is not None  # it stays in the script's dict, where strict loading overlooked it
    ours = load_file(run(TRANSFORMER, TINY, write(tmp_path / "source.safetensors", arrays), tmp_path / "out"))
    assert differing(
        {name: t.numpy() for name, t in ours.items()}, {name: t.contiguous().numpy() for name, t in theirs.items()}
    ) == []  # fmt: skip
