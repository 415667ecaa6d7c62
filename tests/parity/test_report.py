"""Reports of real comparisons: the document and its schema, the page, Markdown, JUnit, the scoreboard."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from markupsafe import escape
from torch import Tensor, nn

import conversions.flux1.recipe as flux
from conversions.flux1.case import CASES
from parity import early, heat, junit
from parity.case import Case, Draw, Side
from parity.chart import Curve, chart, module_chart
from parity.document import document, write
from parity.html import page, pictures
from parity.markdown import ROWS, to_markdown
from parity.outcome import Options, Outcome
from parity.own import run_case
from parity.run import run_parity
from parity.wording import sentence
from porter.core.convert import convert
from porter.core.errors import BadInputError, MissingError, ResourceError, UsageError
from porter.core.port import Port
from porter.core.units import several

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "parity.schema.json").read_text()))
HOSTILE = (
    "</td><script>alert(1)</script>`x`|\n# Title\n- @all [a](http://b) ![i](//c) \x1b]0;x\x07 \ufffe \ud800 'q\" <!--"
)
COMMAND = f"porter parity '{HOSTILE}'"


def compare(port: Path, **options: Any) -> Outcome:
    return run_parity(Port.open(port), "flux1", CASES, Options(steps=2, **options))


@pytest.fixture(scope="module")
def good(tiny_port: Path) -> Outcome:
    """Everything that there is to compare of the embedded model's port."""
    return compare(tiny_port)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same with the fault that the demo plants, against the trace."""
    port = tmp_path_factory.mktemp("bad") / "port"
    recipe = flux.TRANSFORMER.replace_rule("final_layer.adaLN_modulation.1.{p:weight|bias}", ops=())
    convert("builtin:tiny-flux", port, recipe={"transformer": recipe})
    return compare(port, components=("transformer",), against=("trace",))


class Chain(nn.Module):
    """Blocks one after another, under names of the test's choice; `spoil` is done to what one of them answers."""

    def __init__(
        self, names: list[str], eps: dict[str, float], spoil: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {n: nn.Sequential(nn.LayerNorm(6, eps.get(n, 1e-5)), nn.Linear(6, 6)) for n in names}
        )
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = x + block(x)
        return self.spoil(x) if self.spoil else x


def own(
    names: list[str], eps: dict[str, float], spoil: Callable[[Tensor], Tensor] | None = None, name: str = "m"
) -> Outcome:
    """A comparison of one's own, without a port; its case file is this one."""

    def inputs(config: Any, draw: Draw) -> dict[str, Tensor]:
        return {"x": draw("x", 2, 5, 6)}

    case = Case(
        Side(lambda _: Chain(names, {})), Side(lambda _: Chain(names, eps, spoil), name=name), inputs, name=name
    )
    return run_case(case, Options(), case_file=Path(__file__))


@pytest.fixture(scope="module")
def hostile() -> Outcome:
    """Names of modules, of the case and of its side that try to be markup, with a fault in one of them."""
    strange = HOSTILE.replace(".", "").replace("\ud800", "")
    return own([strange, "1"], {strange: 1e-2, "1": 1e-2}, name=HOSTILE)


@pytest.fixture(scope="module")
def nans() -> Outcome:
    """A candidate that answers NaN."""
    return own(["0", "1"], {}, spoil=lambda x: x * torch.nan)


def test_the_document_says_what_was_compared(good: Outcome) -> None:
    data = document(good, "porter parity port")
    assert data["passed"] and data["holds"] and not data["partial"] and data["guilty"] is None
    assert data["components"][0]["title"] == "transformer (native) against trace"
    for component, result in zip(data["components"], good.components, strict=True):
        assert component["counts"]["compared"] == len(component["modules"]) + len(component["outputs"])
        assert [m["key"] for m in component["modules"]] == [t.key for t in result.taps]
        assert component["headline"]["max_abs"] == pytest.approx(result.headline.max_abs, rel=1e-4)  # type: ignore[union-attr]
    module = data["components"][0]["modules"][1]
    assert (module["pass"], module["reference"], module["call"], module["kind"]) == ("forward", "img_in", 0, "out")
    assert module["free"]["noise_reference"] > 0 and data["pipeline"]["stages"][-1]["name"] == "image"


def test_the_guilty_module_has_both_names_call_and_rule(bad: Outcome) -> None:
    guilty = document(bad, "")["guilty"]
    assert guilty["candidate"] == "norm_out.linear" and guilty["reference"] == "final_layer.adaLN_modulation.1"
    assert (guilty["component"], guilty["pass"], guilty["call"]) == ("transformer", "forward", 0)
    assert "swap halves" in guilty["rule"] and "its inputs match" in guilty["why"]


@pytest.mark.parametrize("name", ["good", "bad", "hostile", "nans"])
def test_every_document_follows_the_schema(name: str, request: pytest.FixtureRequest) -> None:
    data = document(request.getfixturevalue(name), COMMAND)
    text = json.dumps(data, allow_nan=False)
    SCHEMA.validate(json.loads(text))
    text.encode()
    for broken in ({**data, "more": 1}, {**data, "gate": None}, {**data, "schema": "porter.parity/2"}):
        assert not SCHEMA.is_valid(broken)
    stripped = copy.deepcopy(data)
    del stripped["components"][0]["modules"][0]["free"]["floor"]
    assert not SCHEMA.is_valid(stripped)


def test_numbers_that_are_not_finite_are_null(nans: Outcome) -> None:
    data = document(nans, "")
    output = data["components"][0]["outputs"][0]
    assert output["status"] == "differs" and output["max_abs"] is None and "NaN" in output["note"]
    loads = document(Outcome(None, "m", Options(), facts={"environment": {"load": [torch.inf, 1.0]}}), "")
    assert loads["environment"]["load"] == [None, 1.0]
    assert "NaN" in page(data) and ">–<" in page(data) and " | – | " in to_markdown(data)


@pytest.mark.parametrize("name", ["good", "bad", "hostile", "nans"])
def test_files_are_whole_and_the_page_is_one_file(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    outcome = request.getfixturevalue(name)
    json_file, html_file = write(outcome, COMMAND, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["parity.json", "report.html"]
    data = json.loads(json_file.read_text())
    text = html_file.read_text()
    parser = Page()
    parser.feed(text)
    assert not parser.open and parser.scripts == 0
    assert all(uri.startswith(("data:image/png;base64,", "#c")) for uri in parser.fetched)
    assert "url(" not in text and "@import" not in text
    assert '"Content-Security-Policy" content="default-src \'none\'' in text
    for value in (sentence(data), COMMAND.replace("\ud800", "\\ud800"), *(c["title"] for c in data["components"])):
        assert str(escape(value)) in text
    shas = [sha for files in data["weights"].values() for sha in files.values()]
    shas += [t["sha256"] for t in data["traces"].values() if "sha256" in t] + list(data["code"].values())
    shas += [r["digest"] for r in data["recipes"].values() if r]
    shas += [data["manifest_sha256"]] if outcome.port else [data["case"]["sha256"]]
    assert len(shas) > 2 and all(sha in text for sha in shas)
    assert all(f">{version}<" in text for version in data["environment"].values())


class Page(HTMLParser):
    """Tags close in order; what would be fetched, and how many scripts there are."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        self.scripts += tag == "script" or any(k.startswith("on") for k, _ in attrs)
        assert tag != "img" or dict(attrs)["alt"]
        assert tag != "th" or "scope" in dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_curves_heat_and_pictures(good: Outcome) -> None:
    data = document(good, "")
    text = page(data, good.pipeline.images if good.pipeline else None)
    assert text.count('class="chart"') == 5 and text.count("<img ") == 3 and "every pixel is equal" in text
    assert text.count("<tbody>") > 30 and "double_blocks.0 <" in text and "step 1 <" in text
    for words in ("float32, free-running", "float64, free-running", "input reset", "noise floor", "Error by step"):
        assert words in text
    assert text.startswith("<!doctype html>")


def test_the_heat_map_has_every_call_in_order(good: Outcome) -> None:
    for component in document(good, "")["components"]:
        rows = [row for group in heat.module_groups(component) for row in group.rows]
        calls = [(m["pass"], m["reference"], m["call"]) for m in component["modules"]]
        assert {row.call for row in rows} == set(calls)
        assert all(len(row.cells) == len(heat.MODULES) for row in rows)
        blocks = [group.name for group in heat.module_groups(component)]
        assert len(blocks) > 5 and any(name.endswith(".1") for name in blocks)
    stages = heat.stage_groups(document(good, "")["pipeline"])
    assert [g.name for g in stages] == [heat.BEFORE, "step 0", "step 1", "after the steps"]
    assert sum(len(g.rows) for g in stages) == len(document(good, "")["pipeline"]["stages"])


def test_the_heat_map_unfolds_what_is_at_fault(bad: Outcome) -> None:
    component = document(bad, "")["components"][0]
    groups = heat.module_groups(component)
    (unfolded,) = [g for g in groups if g.open]
    (row,) = [r for r in unfolded.rows if r.guilty]
    assert row.name == "final_layer.adaLN_modulation.1" and not row.passed
    received, single, double = row.cells[:3]
    assert not received.bad and single.bad and double.bad and double.value == pytest.approx(1.7, abs=0.1)
    drawn = module_chart(component, groups)
    assert drawn is not None and len(drawn.guilty) == 1 and drawn.last == "final_layer.linear"


def test_two_faults_stand_alone() -> None:
    data = document(own([str(i) for i in range(8)], {"2": 1e-2, "6": 1e-2}), "")
    assert [f["reference"] for f in data["components"][0]["faults"]] == ["blocks.2.0", "blocks.6.0"]
    groups = heat.module_groups(data["components"][0])
    assert [g.name for g in groups if g.open] == ["blocks.2", "blocks.6"]
    assert all(not g.passed for g in groups[2:]) and all(g.passed for g in groups[:2])
    text, lines = page(data), to_markdown(data)
    assert "1 further fault" in text and "fails by itself" in text
    assert "1 further fault, each with" in lines and "blocks.6.0 ↔ blocks.6.0, call 0" in lines


def test_a_pipeline_shows_pictures_guards_and_draws(good: Outcome) -> None:
    data = document(good, "")
    pipeline = data["pipeline"]
    assert pipeline["metrics"]["psnr"] is None and pipeline["metrics"]["ssim"] == 1 and pipeline["guards"]
    text = page(data, good.pipeline.images if good.pipeline else None)
    assert "equal pictures" in text and all(str(escape(g["name"])) in text for g in pipeline["guards"])
    first, second = (len(side) for side in pipeline["draws"])
    requests = f"{several(first, 'request')} of the reference, {second} of the candidate"
    assert requests in text and pipeline["draws"][0][0]["function"] in text
    root = ET.fromstring(junit.to_junit(data))
    names = [c.get("name") for c in root[-1].iter("testcase")]
    assert names == ["verdict", *(v["name"] for v in pipeline["stages"] + pipeline["guards"])]
    changed = {**pipeline["metrics"], "max_abs": 0.01, "psnr": 41.234, "ssim": 0.99876}
    text = page({**data, "pipeline": {**pipeline, "metrics": changed, "pixels_changed": 12}})
    assert "PSNR 41.2 dB, SSIM 0.9988" in text
    assert "Pictures: equal pictures; 0 pixels changed in 8 bits." in to_markdown(data)


def test_a_run_in_low_precision_says_so(tiny_port: Path) -> None:
    outcome = compare(tiny_port, components=("transformer",), against=("diffusers",), dtype="bfloat16")
    data = document(outcome, "")
    SCHEMA.validate(data)
    assert data["dtype"] == "bfloat16" and data["partial"]
    text, lines = page(data), to_markdown(data)
    assert "bfloat16, judged by the distance from the float64 truth, cpu" in text and "candidate in bfloat16" in text
    assert "float32, free-running" not in text and "judged by the distance from the float64 truth" in lines


def test_levels_are_decades() -> None:
    levels = [heat.Cell(value).level for value in (None, 0.0, 1e-20, 1e-16, 2e-7, 1e-3, 0.5, 1.0, 1e9)]
    assert levels == [None, 0, 1, 1, 10, 14, 16, 17, 17]


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_on_every_colour_can_be_read(dark: bool) -> None:
    def rgb(color: str) -> list[int]:
        return [int(color[i : i + 2], 16) for i in (1, 3, 5)]

    shades = [heat.shade(level, dark) for level in range(heat.LEVELS)]
    assert len({background for background, _ in shades}) == heat.LEVELS
    assert min(heat.contrast(rgb(back), rgb(text)) for back, text in shades) > 4.5


def test_a_chart_keeps_zeros_and_gaps_apart() -> None:
    drawn = chart(["a", "b", "c", "d"], [Curve("x", "free", [1e-3, 0.0, None, 1e-6])])
    assert drawn.curves[0]["line"].count("M") == 2 and "L" not in drawn.curves[0]["line"]
    assert drawn.curves[0]["dots"].count("h0") == 3 and drawn.grid[-1][1] == "0"
    assert drawn.summary == "x: 3 values, the largest 1.0e-03 at a" and len(drawn.titles) == 4
    assert chart(["a"], [Curve("x", "free", [None])]).summary == "x: no values"


def test_pictures_show_what_differs() -> None:
    torch.manual_seed(0)
    left = torch.rand(3, 8, 8)
    right = left.clone()
    right[0, 3, 4] += 0.25 if left[0, 3, 4] < 0.5 else -0.25
    assert [p["caption"] for p in pictures((left, right))] == ["reference", "candidate", "difference; white is 2.5e-01"]
    assert len(pictures((left, right[:, :4]))) == 2 and pictures(None) == []
    assert len(pictures((left, right * torch.nan))) == 3


def test_markdown_says_what_a_reviewer_needs(bad: Outcome, good: Outcome) -> None:
    failing, passing = to_markdown(document(bad, "porter parity p")), to_markdown(document(good, "porter parity p"))
    assert failing.startswith("## Parity of `flux1`: FAIL\n") and passing.startswith("## Parity of `flux1`: PASS\n")
    assert "- candidate: `norm_out.linear`" in failing and "- where: transformer, pass forward, call 0" in failing
    assert "- rule: `final_layer.adaLN_modulation.1.{p:weight|bias} → norm_out.linear.{p} (swap halves)`" in failing
    assert "✗ over the gate" in failing and "`forward/final_layer.adaLN_modulation.1#0.out.0`" in failing
    for words in ("noise of the reference", "- torch ", "```sh\nporter parity p\n```\n", "manifest: `"):
        assert words in failing and words in passing
    assert "guilty" not in passing and passing.count("✓") == 5 and "✗" not in passing
    assert passing.count("<details>") == passing.count("</details>")


def test_nothing_hostile_makes_markdown(hostile: Outcome) -> None:
    text = to_markdown(document(hostile, COMMAND))
    plain = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text.split("```sh")[0])  # what stands in code spans is text
    for markup in (r"(?<!\\)<(?!/?(details|summary)>)", r"(?<!\\)@", r"(?<!\\)\[", r"http://", r"\x1b", r"(?m)^# "):
        assert not re.search(markup, plain), markup
    widths = {line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| ")}
    assert widths <= {10, 7, 9}
    assert text.count("```") == 2 and text.splitlines()[-2].startswith("porter parity ")


def test_markdown_stays_short_and_says_what_it_left_out() -> None:
    data = document(own([str(i) for i in range(30)], {"0": 1e-2}), "")
    bad = sum(not m["free"]["passed"] for m in data["components"][0]["modules"])
    text = to_markdown(data)
    assert bad > ROWS and re.search(r"\d+ more are in `parity.json`", text) and len(text) < 65536


@pytest.mark.parametrize("name", ["good", "bad", "hostile", "nans"])
def test_junit_counts_every_comparison(name: str, request: pytest.FixtureRequest) -> None:
    data = document(request.getfixturevalue(name), COMMAND)
    raw = junit.to_junit(data)
    root = ET.fromstring(raw)
    first, *suites = root
    assert first.get("name") == "the whole"
    for suite, result in zip(suites, data["components"], strict=data["pipeline"] is None):
        assert len(suite.findall("testcase")) == 1 + len(result["modules"]) + len(result["outputs"])
        verdicts = [e["free"] for e in result["modules"]] + result["outputs"]
        bad = [v for v in verdicts if not v["passed"]]
        assert len(suite.findall("testcase/failure")) == len(bad) + (not result["passed"])
    for key, tag in (("tests", "testcase"), ("failures", "testcase/failure"), ("errors", "testcase/error")):
        assert (
            int(root.get(key, -1)) == sum(len(s.findall(tag)) for s in root) == sum(int(s.get(key, -1)) for s in root)
        )
    assert root.findall(".//skipped") == [] and (root.get("failures") == "0") == data["holds"]
    assert b"\x1b" not in raw and b"\xef\xbf\xbe" not in raw


def test_junit_names_the_guilty_module(bad: Outcome) -> None:
    root = ET.fromstring(junit.to_junit(document(bad, "")))
    case = next(c for c in root.iter("testcase") if c.get("name") == "verdict")
    failure = case.find("failure")
    assert failure is not None and failure.get("type") == "over the gate"
    assert "rule: final_layer.adaLN_modulation.1" in (failure.text or "") and "call: 0" in (failure.text or "")


def test_what_was_not_compared_is_an_error_in_junit(own_port: Path) -> None:
    manifest = json.loads((own_port / "manifest.json").read_text())
    for entry in manifest["source"]["files"].values():
        entry["sha256"] = "0" * 64
    (own_port / "manifest.json").write_text(json.dumps(manifest))
    root = ET.fromstring(junit.to_junit(document(compare(own_port, against=("trace",), components=("vae",)), "")))
    assert root.get("failures") == "0" and root.get("errors") == "1" and root.findall(".//skipped") == []
    assert "other weights" in str(root.find(".//error").get("message"))  # type: ignore[union-attr]
    nothing = ET.fromstring(junit.to_junit(document(Outcome(None, "m", Options()), "")))
    assert nothing.get("errors") == "1" and "nothing was compared" in ET.tostring(nothing, encoding="unicode")


def test_an_unproven_component_is_an_error_in_junit(good: Outcome) -> None:
    found = Outcome(good.port, "flux1", Options(), components=good.components[2:3], unproven=["vae"], facts=good.facts)
    assert found.holds and not found.passed
    root = ET.fromstring(junit.to_junit(document(found, "")))
    assert root.get("errors") == "1" and root.get("failures") == "0"
    assert "no verdict on the whole (not compared with the original: vae)" in sentence(document(found, ""))


def test_where_a_junit_file_may_go(tmp_path: Path, bad: Outcome) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, error in (
        (tmp_path, UsageError), (tmp_path / "weights.safetensors", UsageError), (tmp_path / "link", UsageError),
        (tmp_path / "none" / "x.xml", MissingError),
    ):  # fmt: skip
        with pytest.raises(error):
            early.junit_file(place)
    data = document(bad, "")
    early.junit_file(tmp_path / "parity.xml")
    junit.save(data, tmp_path / "parity.xml")
    early.junit_file(tmp_path / "parity.xml")  # an earlier one of its own may be replaced
    assert (tmp_path / "weights.safetensors").read_bytes() == b"precious"
    with pytest.raises(ResourceError):
        junit.save(data, Path("/dev/null/x.xml"))


def test_the_scoreboard(good: Outcome, bad: Outcome, hostile: Outcome, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "parity.scoreboard", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
        )

    for name, outcome in (("alpha", good), ("beta", bad), ("gamma", hostile)):
        write(outcome, COMMAND, tmp_path / name)
    assert "8 comparisons" in run().stdout
    readme, index = (tmp_path / "README.md").read_text(), (tmp_path / "index.html").read_text()
    assert readme.count("\n| flux1 | ") == 7 and "[alpha](alpha/report.html): PASS max" in readme
    assert "| original code (flux.model:Flux at 802fb47) | rounding | 2.4e-06 |" in readme
    parser = Page()
    parser.feed(index)
    assert not parser.open and not parser.scripts
    assert parser.fetched == ["alpha/report.html", "beta/report.html", "gamma/report.html"]
    assert "1 of 3 published reports holds" in index and "norm_out.linear" in index
    (tmp_path / "beta" / "parity.json").write_text("{}")
    failed = run()
    assert (
        failed.returncode
        and BadInputError.__name__ in failed.stderr
        and "is no result of porter parity" in failed.stderr
    )
