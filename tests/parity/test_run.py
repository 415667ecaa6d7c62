"""What is compared with what, what a verdict is bound to, and what is never called a pass."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversions.flux1.case import CASES, NATIVE
from parity import truths
from parity.align import Alignment, Part
from parity.component import ComponentResult, compare_component
from parity.document import document, write
from parity.outcome import Options, Outcome
from parity.run import run_parity
from parity.trace import Trace
from porter.core.errors import CheckpointError, MissingError, UsageError
from porter.core.port import Port

REFERENCES = os.environ.get("PORTER_REFERENCES")


def compare(port: Path, **options: Any) -> Outcome:
    return run_parity(Port.open(port), "flux1", CASES, Options(**options))


def edit_weights(port: Path, component: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = (port / component).glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_native_equals_diffusers_for_any_seed(tiny_port: Path, seed: int) -> None:
    outcome = compare(tiny_port, components=("transformer",), against=("diffusers",), seed=seed)
    (result,) = outcome.components
    assert outcome.holds and not outcome.passed and outcome.partial
    assert outcome.unproven == ["transformer", "vae"]  # agreeing with diffusers says nothing about the conversion
    assert result.counts == {"compared": len(result.verdicts), "skipped": 0, "missing": 0}
    assert result.headline is not None and result.headline.max_abs64 < 1e-11


def test_trace_and_verdict_of_both_components(tiny_port: Path) -> None:
    outcome = compare(tiny_port, against=("trace",))
    assert [(r.component, r.candidate, r.passed) for r in outcome.components] == [
        ("transformer", "native", True),
        ("transformer", "diffusers", True),
        ("vae", "diffusers", True),
    ]
    assert outcome.unproven == [] and outcome.conclusion().startswith("PASS max|Δ| = ")
    assert set(outcome.facts["weights"]) == {"transformer", "vae"}
    assert outcome.facts["manifest_sha256"] == Port.open(tiny_port).manifest_sha256


def test_a_recorded_reference_without_a_run_in_the_dtype_says_so_and_blames_no_module(tiny_port: Path) -> None:
    outcome = compare(tiny_port, components=("transformer",), dtype="bfloat16")
    recorded = [r for r in outcome.components if r.against == "trace"]
    assert {r.reason.partition(":")[0] for r in recorded} == {"the reference has no run in bfloat16"}
    assert recorded and all(r.guilty is None for r in recorded)
    assert not outcome.passed and [r.passed for r in outcome.components if r.against == "diffusers"] == [True]


def test_a_narrowed_run_is_no_verdict_wherever_it_is_written(own_port: Path) -> None:
    outcome = compare(own_port, against=("trace",))
    assert outcome.holds and outcome.unproven == [] and not outcome.passed
    write(outcome, "", own_port / "parity")
    assert Port.open(own_port).verdict() == "failed"


def test_a_converted_component_without_a_case_is_unproven(own_port: Path) -> None:
    manifest = json.loads((own_port / "manifest.json").read_text())
    manifest["components"]["text_encoder"] = {**manifest["components"]["vae"]}
    (own_port / "manifest.json").write_text(json.dumps(manifest))
    assert compare(own_port, against=("trace",)).unproven == ["text_encoder"]


def test_a_trace_that_watched_less_proves_less(transformer: Any) -> None:
    full = transformer.trace
    kept = [event for key, event in full.events.items() if "single_blocks.1.linear1" not in key]
    result = ComponentResult("transformer", "trace", "native", "")
    less = Trace(full.meta, kept, full._tensors)
    compare_component(NATIVE.load(transformer.folder), NATIVE, less, transformer.alignment(NATIVE), result)
    assert result.unwatched == ["single_blocks.1.linear1"] and not result.passed and result.status == "not compared"


def test_a_tensor_of_the_candidate_s_outermost_module_needs_no_tap(transformer: Any) -> None:
    """No module of the candidate has a value to compare with; the output, which it takes part in, is compared."""
    for holder, unwatched in (("", []), ("elsewhere", ["table"])):
        parts = {**transformer.alignment(NATIVE).parts, "table": (Part(holder),)}
        result = ComponentResult("transformer", "trace", "native", "")
        compare_component(NATIVE.load(transformer.folder), NATIVE, transformer.trace, Alignment(parts), result)
        assert result.unwatched == unwatched and result.passed == (not unwatched)


def test_a_port_of_other_weights_is_not_compared(own_port: Path) -> None:
    manifest = json.loads((own_port / "manifest.json").read_text())
    for entry in manifest["source"]["files"].values():
        entry["sha256"] = "0" * 64
    (own_port / "manifest.json").write_text(json.dumps(manifest))
    outcome = compare(own_port, against=("trace",), components=("vae",))
    (result,) = outcome.components
    assert result.status == "not compared" and "other weights" in result.reason and "--reference-repo" in result.reason
    assert not outcome.holds and not outcome.passed and outcome.conclusion().startswith("FAIL vae")


@pytest.mark.parametrize("against", [(), ("trace", "original")])
def test_other_weights_are_compared_with_the_original_live(
    own_port: Path, monkeypatch: pytest.MonkeyPatch, against: tuple[str, ...]
) -> None:
    """The committed trace says nothing about them; only who asks for it by name gets its failure.

    In place of the original code runs a program that hands out the committed trace as one of the port's own weights.
    """
    manifest = json.loads((own_port / "manifest.json").read_text())
    for entry in manifest["source"]["files"].values():
        entry["sha256"] = "0" * 64
    (own_port / "manifest.json").write_text(json.dumps(manifest))
    code = (
        "import json, sys\nfrom safetensors import safe_open\nfrom safetensors.torch import save_file\n"
        "with safe_open(sys.argv[1], 'pt') as file:\n    meta = file.metadata()\n"
        "    tensors = {key: file.get_tensor(key) for key in file.keys()}\n"
        "trace = json.loads(meta['trace'])\ntrace['source']['sha256'] = '0' * 64\n"
        "save_file(tensors, sys.argv[2], {**meta, 'trace': json.dumps(trace)})\n"
    )
    (own_port.parent / "handing_out.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(own_port.parent))
    case = replace(
        CASES.components[1],
        record=lambda model, repo, seed, out: [
            "handing_out",
            str(CASES.components[1].trace),
            str(out / "vae.safetensors"),
        ],
    )
    options = Options(reference_repo=Path("flux"), against=against, source=own_port, reference_python=sys.executable)
    found = list(truths.truths(case, Port.open(own_port), options, against or ("trace", "diffusers", "original")))
    names = [name for name, _, _ in found]
    assert names == (["trace", "original"] if against else ["original"])
    fresh = found[-1][1]
    assert isinstance(fresh, Trace) and fresh.meta["source"]["sha256"] == "0" * 64
    assert bool(found[-1][2]) == (not against)


def test_of_several_traces_the_one_on_the_ports_weights_counts(own_port: Path) -> None:
    """Where none is, the first says so: a component is never left out."""
    port, (case, *others) = Port.open(own_port), CASES.components
    strange = [other for other in others if other.component == case.component]
    assert strange and truths.applicable([*strange, case], port) == [case]
    assert truths.applicable(strange, port) == strange[:1] == truths.applicable([strange[0], strange[0]], port)
    assert truths.applicable(CASES.components, port) == [c for c in CASES.components if c not in strange]


def test_weights_changed_after_conversion(own_port: Path) -> None:
    def scale(state: dict[str, torch.Tensor]) -> None:
        state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 0.5

    edit_weights(own_port, "vae", scale)
    outcome = compare(own_port, against=("trace",), components=("vae",))
    assert not outcome.holds and outcome.changed and "decoder.conv_out" in outcome.conclusion()


def test_changed_files_alone_are_not_a_pass(own_port: Path) -> None:
    edit_weights(own_port, "vae", lambda state: state.update({k: t.float() for k, t in state.items()}))
    outcome = compare(own_port, against=("trace",), components=("vae",))
    assert all(r.passed for r in outcome.components) and not outcome.holds
    assert "changed after conversion" in outcome.conclusion()


def test_wrong_shift_in_the_port_config(own_port: Path) -> None:
    config = json.loads((own_port / "vae" / "config.json").read_text())
    config["shift_factor"] += 0.01
    (own_port / "vae" / "config.json").write_text(json.dumps(config))
    outcome = compare(own_port, against=("trace",), components=("vae",))
    assert not outcome.holds and "shift_factor" in outcome.conclusion()


def test_a_family_that_runs_no_original_code_live_says_so(own_port: Path) -> None:
    cases = replace(CASES, components=tuple(replace(case, record=None) for case in CASES.components))
    options = Options(reference_repo=Path("flux"))
    with pytest.raises(UsageError, match="runs its original code live"):
        run_parity(Port.open(own_port), "flux1", cases, options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"components": ("unet",)}, UsageError, "unknown component 'unet'"),
        ({"against": ("original",)}, UsageError, "needs the original code"),
        ({"against": ("original",), "reference_repo": Path("/nonexistent")}, MissingError, "not a checkout"),
    ],
)
def test_usage(tiny_port: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compare(tiny_port, **options)


def test_broken_traces(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no trace"):
        Trace.open(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(CASES.components[0].trace.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable trace"):
        Trace.open(tmp_path / "cut.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is not a trace"):
        Trace.open(tmp_path / "other.safetensors")


def test_a_trace_without_events_proves_nothing(transformer: Any) -> None:
    empty = Trace({**transformer.trace.meta}, [], {})
    result = ComponentResult("transformer", "trace", "native", "")
    compare_component(NATIVE.load(transformer.folder), NATIVE, empty, transformer.alignment(NATIVE), result)
    assert not result.passed and result.status == "not compared"


def test_a_forged_reference_is_noticed(transformer: Any) -> None:
    """A trace that was changed in one element of one block no longer agrees with the port."""
    trace = Trace.open(transformer.case.trace)
    key = trace.events["forward/single_blocks.1#0.out.0"].stored
    changed = dict(trace._tensors)
    changed[key] = changed[key].clone()
    changed[key][17] += 1e-3
    forged = Trace(trace.meta, list(trace.events.values()), changed)
    result = ComponentResult("transformer", "trace", "native", "")
    compare_component(NATIVE.load(transformer.folder), NATIVE, forged, transformer.alignment(NATIVE), result)
    assert not result.passed and "single_transformer_blocks.1" in str(result.guilty)


def test_document_and_page(tiny_port: Path, tmp_path: Path) -> None:
    outcome = compare(tiny_port, against=("trace",), components=("vae",))
    hostile = "porter parity '<script>alert(1)</script>'"
    paths = write(outcome, hostile, tmp_path / "out")
    data = json.loads(paths[0].read_text())
    assert data["schema"] == "porter.parity/1" and data["passed"] is False and data["holds"] is True
    assert data["components"][0]["counts"]["compared"] == len(data["components"][0]["modules"]) + 2
    assert data["components"][0]["headline"]["max_abs"] == document(outcome, "")["components"][0]["headline"]["max_abs"]
    page = paths[1].read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<svg" in page
    assert "http://" not in page and "https://" not in page.replace("https://github.com", "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["parity.json", "report.html"]


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with a flux checkout")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_live_against_the_original_code(tiny_port: Path, bare_python: str, elsewhere: bool) -> None:
    """Here, and in an interpreter that has torch but not porter."""
    checkout, python = Path(str(REFERENCES)) / "flux", bare_python if elsewhere else None
    outcome = compare(tiny_port, against=("original",), reference_repo=checkout, seed=5, reference_python=python)
    assert outcome.holds and outcome.unproven == []
    assert {(r.component, r.candidate) for r in outcome.components} == {
        ("transformer", "native"),
        ("transformer", "diffusers"),
        ("vae", "diffusers"),
    }
    assert all(v.elements == v.of for r in outcome.components for v in r.verdicts)  # nothing sampled
