"""Reports as headless Chromium shows them on a phone and on a desktop: they fit, ask for nothing, and can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor, nn

from conversions.flux1.case import CASES
from parity.case import Case, Draw, Side
from parity.document import write
from parity.outcome import Options
from parity.own import run_case
from parity.run import run_parity
from parity.scoreboard import page as scoreboard
from parity.scoreboard import read
from porter.core.port import Port
from tests.parity import browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(browser.EXECUTABLE is None, reason="no Chromium here: apt-get install -y chromium"),
]

SIZES = {"phone": browser.PHONE, "desktop": browser.DESKTOP}
LONG = "a_module_with_a_name_that_is_much_longer_than_a_phone_is_wide_and_has_no_place_to_break_it"
# The contrast of every text with what is painted behind it, least first; WCAG asks for 4.5.
CONTRAST = """(() => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest('svg')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.data.trim().slice(0, 40)]); }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 1)[0]; })()"""
# Texts that reach out of the window, although nothing around them scrolls.
OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => {
    const box = e.getBoundingClientRect();
    const out = box.right > innerWidth + 1 || box.left < -1;
    return out && box.width && e.checkVisibility() && !e.closest('svg, thead');
  }).map(e => e.outerHTML.slice(0, 90))"""


class Stack(nn.Module):
    """Blocks under long names; one of them may have another eps."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {f"{LONG}_{i}": nn.ModuleDict({"norm": nn.LayerNorm(6, eps if i == 3 else 1e-5), "out": nn.Linear(6, 6)})
             for i in range(40)}
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            assert isinstance(block, nn.ModuleDict)
            x = x + block["out"](block["norm"](x))
        return x


@pytest.fixture(scope="module")
def reports(tiny_port: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a port that passes, of a case that fails, and the scoreboard of both."""
    folder = tmp_path_factory.mktemp("reports")
    write(run_parity(Port.open(tiny_port), "flux1", CASES, Options(steps=2)), "porter parity port", folder / "good")

    def inputs(config: object, draw: Draw) -> dict[str, Tensor]:
        return {"x": draw("x", 2, 5, 6)}

    case = Case(Side(lambda _: Stack(1e-5)), Side(lambda _: Stack(1e-2)), inputs, name="stack")
    outcome = run_case(case, Options())
    write(outcome, f"porter parity --case {LONG}/{LONG}.py", folder / "bad")
    (folder / "index.html").write_text(scoreboard(read(folder)))
    return folder


PAGES = {
    "good/report.html": ("Parity holds: 5 comparisons pass", "transformer (native) against diffusers", "Error by step",
                         "double_blocks.0", "every pixel is equal", "What this verdict is bound to"),
    "bad/report.html": ("First guilty module", f"{LONG}_3.norm", "activations do not pass",
                        "first guilty module", "eps 1e-05 in the reference, 0.01 in the candidate"),
    "index.html": ("1 of 2 published reports holds", "stack", "original code (flux.model:Flux at 802fb47)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_can_be_read(
    name: str, size: str, dark: bool, reports: Path, tab: browser.Page, tmp_path: Path
) -> None:
    width, height = SIZES[size]
    tab.open(reports / name, (width, height), dark=dark)
    for everything in (False, True):
        if everything:
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.evaluate("innerWidth") == width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(OUTSIDE) == []
        ratio, text = tab.evaluate(CONTRAST)
        assert ratio >= 4.5, text
    shown = tab.evaluate("document.body.innerText")
    assert [words for words in PAGES[name] if words not in shown] == []
    assert tab.evaluate("document.querySelector('h1').getBoundingClientRect().bottom") < height
    assert tab.requests == [] and tab.errors == []
    tab.screenshot(tmp_path / "page.png", whole=False)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, height)
        corner = picture.convert("L").getpixel((1, 1))
    assert isinstance(corner, int) and (corner < 60) == dark


@pytest.mark.parametrize("name", [n for n in PAGES if n != "index.html"])
def test_a_page_needs_no_script(name: str, reports: Path, tab: browser.Page) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(reports / name, browser.DESKTOP)
        closed = "[...document.querySelectorAll('.heat details')].find(d => !d.open)"
        assert tab.evaluate(f"{closed} !== undefined && document.scripts.length") == 0
        tab.evaluate(f"{closed}.id = 'closed'")
        x, y = tab.evaluate(
            "(() => { const s = document.querySelector('#closed > summary'); s.scrollIntoView({block: 'center'});"
            "const b = s.getBoundingClientRect(); return [b.x + 30, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert tab.evaluate("document.querySelector('#closed').open") is True
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_tables_keep_their_headers_for_those_who_listen(reports: Path, tab: browser.Page) -> None:
    tab.open(reports / "good/report.html", browser.PHONE)
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in tree]
    assert roles.count("columnheader") > 9 and roles.count("rowheader") > 5 and roles.count("table") == 5
    images = [n["name"]["value"] for n in tree if n.get("role", {}).get("value") == "image"]
    assert len(images) == 8 and all(images)  # five curves, two pictures and their difference


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_printed(name: str, reports: Path, tab: browser.Page) -> None:
    tab.open(reports / name, browser.DESKTOP, dark=True, media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ratio, text = tab.evaluate(CONTRAST)
    assert ratio >= 4.5, text
    assert len(tab.call("Page.printToPDF", printBackground=True)["data"]) > 10_000
