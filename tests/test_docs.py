"""What the documentation says is true: its commands run, each verb and option is documented, links resolve."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from porter.cli import VERBS, app, main
from porter.commands._parts import WithParts
from porter.core.architectures import architectures
from porter.core.family import families
from porter.core.formulas import formula_of
from porter.core.planning import plan
from porter.core.similarity import family_roles
from porter.core.units import human_bytes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every `porter …` line of a page's indented or fenced blocks, without prompt sign, continuation and comment."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|)(?:\$ )?(porter [a-z].*)$", text, flags=re.MULTILINE)
    return [line.split(" #")[0].strip() for line in lines]


def test_every_readme_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder, as a new user would; the demo has a test of its own."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands(ROOT / "README.md"):
        arguments = shlex.split(line)[1:]
        if arguments[0] != "demo" and "--reference-repo" not in arguments:
            assert main(arguments) == 0, line
            ran.append(arguments[0])
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL):
        exec(code, {})  # the port that the lines above made, loaded and run by diffusers
    assert {"plan", "convert", "parity", "generate", "families"} <= set(ran)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_documented(verb: str) -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"## porter {verb}" in page
    section = page.split(f"## porter {verb}")[1].split("\n## ")[0]
    command = app.get_command(click.Context(app), verb)
    assert command is not None
    parts = [command.part(name) for name in command.parts] if isinstance(command, WithParts) else []
    for part in command.commands.values() if isinstance(command, click.Group) else (command, *parts):
        for parameter in part.params:
            for name in (n for n in parameter.opts if n.startswith("--")):
                assert f"`{name}" in section, f"porter {verb} {name} is not in docs/commands.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_resolve(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing


def test_the_design_names_every_denoiser_without_a_memory_formula() -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8").split("**Still open here**")[1].split("\n\n")[0]
    roles = [roles for family in families().values() for roles in family_roles(family).items()]
    kinds = re.compile(r"transformer|unet|\w+_dit(_2)?")
    denoisers = {name for role, names in roles if kinds.fullmatch(role) for name in names}
    assert {name for name in denoisers if formula_of(name) is None} == set(re.findall(r"`(\w+)`", page))


def test_the_numbers_of_the_front_pages_are_those_that_porter_finds() -> None:
    news, front = ((ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "README.md"))
    found = re.search(r"more than (\d+) layouts of (\d+) families", news)
    homes = {known.family for known in architectures() if known.family}
    assert found and int(found[1]) < len(architectures()) < int(found[1]) + 50 and int(found[2]) == len(homes)
    size = human_bytes(plan("builtin:tiny-flux").bytes)
    assert f"FLUX.1 of {size}" in news and f"FLUX.1 of {size}" in front
