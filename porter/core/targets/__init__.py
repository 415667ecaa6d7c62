"""Frameworks that a model can be ported to: the steps of their guides (`<target>.toml`) and what they already have.

A TOML file holds the guide's facts and its steps in the guide's order; `<target>.classes.json` holds the classes, the
pipelines and the published models of that framework at the same commit, recorded by `record.py`. How a step is written:
docs/checklists.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from porter.core.errors import UsageError

TARGETS = ("porter", "diffusers", "sglang", "fastvideo")
INVENTORY_SCHEMA = "porter.inventory/1"
_STEP_KEYS = {"group", "text", "each", "when", "done", "why", "creates", "edits", "command"}


@dataclass(frozen=True)
class Template:
    """One step of a guide before a model's names are filled in. Braces hold names; see `names.py`.

    Attributes:
        each: the role of the components that get a step of their own, or `all:<role>` for one step that names them all.
        when: conditions that must all hold; `!` negates.
        done: the check that ticks the step, none where only a person can tell.
    """

    group: str
    text: str
    each: str = ""
    when: tuple[str, ...] = ()
    done: str = ""
    why: str = ""
    creates: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class Target:
    """A framework: where its guide is, what it has, and its steps.

    Attributes:
        commit: commit or tag that the guide, the paths and the inventory were read at; empty for this project.
        root: where its package begins, left out where a path only explains.
        guide: the guide's files inside the repository.
        libraries: libraries whose encoders, tokenizers and schedulers it uses as they are.
        classes, pipelines, models: name -> file inside the repository.
        files: the repository's files in every folder that a step names.
    """

    name: str
    title: str
    repository: str
    commit: str
    root: str
    guide: tuple[str, ...]
    libraries: tuple[str, ...]
    steps: tuple[Template, ...]
    classes: Mapping[str, str] = field(default_factory=dict)
    pipelines: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    files: frozenset[str] = frozenset()


@cache
def target_named(name: str) -> Target:
    """The framework called `name`, read from this folder.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"no target is called {name!r}", expected=", ".join(TARGETS), hint="porter plan --help")
    folder = Path(__file__).parent
    import tomllib

    facts = tomllib.loads((folder / f"{name}.toml").read_text("utf-8"))
    recorded = folder / f"{name}.classes.json"
    has: dict[str, Any] = json.loads(recorded.read_text("utf-8")) if recorded.is_file() else {}
    steps = tuple(_template(step) for step in facts["steps"])
    return Target(
        name=name,
        title=facts["title"],
        repository=facts["repository"],
        commit=has.get("commit", ""),
        root=facts.get("root", ""),
        guide=tuple(facts["guide"]),
        libraries=tuple(facts.get("libraries", ())),
        steps=steps,
        **{kind: has.get(kind, {}) for kind in ("classes", "pipelines", "models")},
        files=frozenset(
            name if folder == "." else f"{folder}/{name}"
            for folder, names in has.get("files", {}).items()
            for name in names
        ),
    )


def _template(step: dict[str, Any]) -> Template:
    if odd := set(step) - _STEP_KEYS:
        raise ValueError(f"a step has unknown keys: {', '.join(sorted(odd))}")
    lists = {key: tuple(step.get(key, ())) for key in ("when", "creates", "edits")}
    return Template(**{**step, **lists})
