"""`porter parity` as a user types it: exit codes, what is printed, what is left on disk."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

import conversions.flux1.recipe as flux
from porter.cli import main
from porter.commands import _parity_view
from porter.commands._render import console
from porter.core.convert import convert
from porter.core.port import Port

FAST = ["--steps", "2"]


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_good_port_passes(own_port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(own_port), *FAST]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1].startswith("PASS max|Δ| = ") and "(floor " in out
    for row in ("transformer (native)", "transformer (diffusers)", "vae (diffusers)", "pipeline (native)"):
        assert row in out
    for count in ("compared", "skipped", "missing"):
        assert count in out
    assert Port.open(own_port).verdict() == "passed"
    document = json.loads((own_port / "parity" / "parity.json").read_text())
    assert document["schema"] == "porter.parity/1" and document["passed"] and document["guilty"] is None
    assert document["manifest_sha256"] == Port.open(own_port).manifest_sha256
    assert document["recipes"]["transformer"]["digest"] and document["code"]["conversions.flux1"]
    assert document["traces"]["vae"]["reference"]["commit"] and document["environment"]["torch"]
    page = (own_port / "parity" / "report.html").read_text()
    parser = Page()
    parser.feed(page)
    assert not parser.open and len(parser.fetched) == 3  # two pictures and their difference
    assert all(uri.startswith("data:image/png;base64,") for uri in parser.fetched)
    assert page.count('class="chart"') == 5 and 'name="viewport"' in page and document["manifest_sha256"] in page


def test_a_port_with_the_swap_left_out_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fault that the demo plants."""
    pattern = "final_layer.adaLN_modulation.1.{p:weight|bias}"
    recipe = flux.TRANSFORMER.replace_rule(pattern, ops=())
    convert("builtin:tiny-flux", tmp_path / "port", recipe={"transformer": recipe})
    assert main(["parity", str(tmp_path / "port"), *FAST]) == 1
    captured = capsys.readouterr()
    last = captured.out.rstrip().splitlines()[-1]
    assert last.startswith("FAIL first guilty module: norm_out.linear ↔ final_layer.adaLN_modulation.1 (rule ")
    assert captured.out.count("final_layer.adaLN_modulation.1 (rule") == 2  # once for each side that fails
    assert "report.html" in captured.err and "norm_out.linear" not in captured.err  # said once
    document = json.loads((tmp_path / "port" / "parity" / "parity.json").read_text())
    assert document["passed"] is False and document["guilty"]["reference"] == "final_layer.adaLN_modulation.1"
    against = {(c["candidate"], c["against"]): c["passed"] for c in document["components"] if c["component"] != "vae"}
    assert against[("native", "trace")] is False and against[("diffusers", "trace")] is False
    # Both implementations share the port's wrong weights: they agree, which proves nothing.
    assert against[("native", "diffusers")] is True
    assert all(stage["passed"] for stage in document["pipeline"]["stages"])
    assert "norm_out.linear" in (tmp_path / "port" / "parity" / "report.html").read_text()
    assert Port.open(tmp_path / "port").verdict() == "failed"


def test_json_is_one_document(own_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "elsewhere"
    assert main(["parity", str(own_port), "--component", "vae", "--json", "-o", str(out)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["schema"] == "porter.parity/1" and [c["component"] for c in document["components"]] == ["vae"]
    assert document["passed"] is False and document["holds"] is True and document["unproven"] == ["transformer"]
    assert sorted(p.name for p in out.iterdir()) == ["parity.json", "report.html"]
    assert not (own_port / "parity").exists()


def test_markdown_and_junit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failing port: Markdown is all that stdout gets, and the JUnit file is there although the command fails."""
    pattern = "final_layer.adaLN_modulation.1.{p:weight|bias}"
    recipe = {"transformer": flux.TRANSFORMER.replace_rule(pattern, ops=())}
    convert("builtin:tiny-flux", tmp_path / "port", component="transformer", recipe=recipe)
    arguments = ["parity", str(tmp_path / "port"), "--against", "trace", "--junit", str(tmp_path / "parity.xml")]
    assert main([*arguments, "--markdown"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("## Parity of `flux1`: FAIL\n") and captured.out.endswith("\n```\n")
    assert "- candidate: `norm_out.linear`" in captured.out and "does not hold" in captured.err
    root = ElementTree.parse(tmp_path / "parity.xml").getroot()
    document = json.loads((tmp_path / "port" / "parity" / "partial" / "parity.json").read_text())
    compared = sum(c["counts"]["compared"] for c in document["components"])
    assert int(root.get("tests", 0)) == compared + len(document["components"]) + 2
    assert int(root.get("failures", 0)) > 0 and root.get("errors") == "0"


def test_a_partial_run_does_not_touch_the_verdict(own_port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(own_port), "--component", "transformer", "--against", "diffusers", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PASS") and len(out.splitlines()) == 1 and "not compared with the original" in out
    assert Port.open(own_port).verdict() == "missing"
    assert (own_port / "parity" / "partial" / "parity.json").is_file()


def test_the_gate_is_a_fence_and_no_more(own_port: Path) -> None:
    assert main(["parity", str(own_port), "--component", "vae", "--gate", "1e-9", "-q"]) == 1
    assert main(["parity", str(own_port), "--component", "vae", "--gate", "1", "-q"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["no-such-port"], 4, "no such port folder"),
        (["PORT", "--component", "unet"], 2, "unknown component 'unet'"),
        (["PORT", "--against", "original"], 2, "--reference-repo"),
        (["PORT", "--against", "nothing"], 2, "nothing"),
        (["PORT", "--gate", "0"], 2, "--gate must be positive"),
        (["PORT", "--json", "--markdown"], 2, "both want stdout"),
        (["PORT", "--junit", "PORT/manifest.json"], 2, "lies among the port's own files"),
        (["PORT", "--junit", "/nonexistent/parity.xml"], 4, "no folder /nonexistent"),
        (["PORT", "--junit", "/dev"], 2, "is a folder"),
        (["PORT", "--against", "original", "--reference-repo", "/dev/null"], 4, "no such checkout"),
        (["PORT", "--component", "vae", "-o", "/dev/null/report"], 2, "/dev/null is no folder"),
        (["PORT", "--component", "vae", "-o", "/proc/report"], 5, "cannot be written"),
    ],
)
def test_bad_input(
    tiny_port: Path, arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tiny_port.rglob("*"))
    assert main(["parity", *(a.replace("PORT", str(tiny_port)) for a in arguments)]) == code
    captured = capsys.readouterr()
    assert text in captured.err and "Traceback" not in captured.err
    assert sorted(tiny_port.rglob("*")) == before


def test_a_transformer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(tmp_path / "port")
    convert("builtin:tiny-flux", port, component="transformer")
    assert main(["parity", port]) == 0
    assert "pipeline" not in capsys.readouterr().out and Port.open(port).verdict() == "passed"
    assert main(["parity", port, "--component", "pipeline"]) == 2
    assert "the port has no pipeline" in capsys.readouterr().err


def test_damaged_weights(own_port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (own_port / "transformer").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["parity", str(own_port)]) == 6
    assert path.name in capsys.readouterr().err
    assert not (own_port / "parity").exists()


@pytest.mark.parametrize(("width", "skipped"), [(44, 0), (60, 0), (80, 0), (80, 2), (140, 2)])
def test_a_narrow_table_drops_columns_and_cuts_no_number(
    width: int, skipped: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    verdict = SimpleNamespace(status="differs", max_abs=2.437e-6, floor=3.8e-6, ratio=414000.0)
    counts = {"compared": 199, "skipped": skipped, "missing": 0}
    result = SimpleNamespace(component="text_encoder_2", candidate="diffusers", against="original", passed=False,
                             status="differs (precision)", headline=verdict, counts=counts)  # fmt: skip
    rows, rest = _parity_view.comparisons(SimpleNamespace(results=[result]), width)
    console().print(rows)
    shown = capsys.readouterr().out
    assert "2.4e-06" in shown and "199" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert ("skipped" in shown) == bool(skipped) and ("414000" in shown) == (width > 44)
    assert width < 140 or "3.8e-06" in shown
    assert rest == ("missing: 0 everywhere" if skipped else "skipped and missing: 0 everywhere")
