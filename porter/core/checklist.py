"""What is left to do before a model runs in another framework: that framework's own guide, filled in for this model.

The steps and what the framework already has are data (`targets/`); here they are put together with a plan. A step is
ticked only where the plan, the catalogue or the framework's recorded inventory shows that it is done.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from porter.core.errors import BadInputError
from porter.core.plan import PortPlan
from porter.core.records import check_keys
from porter.core.targets import TARGETS, Target, Template, target_named
from porter.core.targets.checks import check
from porter.core.targets.facts import Facts, Piece, facts_of
from porter.core.targets.names import shown

__all__ = ["TARGETS", "Checklist", "Guide", "Step", "checklist"]
SCHEMA = "porter.checklist/1"
_EXISTS = "exists already: extend it where it is this model's, else choose another name"


@dataclass(frozen=True)
class Guide:
    """The guide that a checklist follows: files of a repository at a commit or tag (empty: this project's own)."""

    repository: str
    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        group: the heading it stands under.
        text: what to do; names stand in backticks, and no name holds a backtick or a line break.
        done: whether it is done already.
        why: what shows that it is done, or what to know before doing it.
        creates: files to write; edits: files that exist and change. Paths inside the framework's repository; none once
            the step is done.
        command: a shell command for it.
    """

    group: str
    text: str
    done: bool = False
    why: str = ""
    creates: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    command: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the step."""
        return self.creates + self.edits


@dataclass(frozen=True)
class Checklist:
    """The steps of one framework's guide for one model; `to_json` and `from_json` keep all of it.

    Attributes:
        notes: what to decide or to know before the first step.
    """

    target: str
    title: str
    guide: Guide
    notes: tuple[str, ...]
    steps: tuple[Step, ...]

    def groups(self) -> Iterator[tuple[str, list[Step]]]:
        """(heading, its steps) in the guide's order."""
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.group, []).append(step)
        yield from found.items()

    def to_json(self) -> dict[str, Any]:
        """The checklist as a JSON document."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Checklist:
        """The inverse of `to_json`.

        Raises:
            BadInputError: another schema, a missing or an unknown key.
        """
        if document.get("schema") != SCHEMA:
            raise BadInputError("not a checklist", expected=SCHEMA, found=shown(str(document.get("schema"))))
        rest = {key: value for key, value in document.items() if key != "schema"}
        every: list[tuple[Any, Any]] = [(cls, rest), (Guide, rest.get("guide"))]
        every += [(Step, step) for step in rest.get("steps") or ()]
        check_keys(every, "checklist", "porter plan --target")
        guide = Guide(**{**rest["guide"], "files": tuple(rest["guide"]["files"])})
        steps = tuple(
            Step(**{**step, "creates": tuple(step["creates"]), "edits": tuple(step["edits"])}) for step in rest["steps"]
        )
        return cls(**{**rest, "guide": guide, "notes": tuple(rest["notes"]), "steps": steps})


def checklist(plan: PortPlan, target: str) -> Checklist:
    """The steps of `target`'s guide for the model of `plan`, with what is done ticked.

    Raises:
        UsageError: no target of this name.
    """
    framework = target_named(target)
    facts = facts_of(plan, framework)
    steps = [step for template in framework.steps for step in _filled(template, framework, facts)]
    return Checklist(
        target=target,
        title=f"`{shown(facts.called)}` in {framework.title}",
        guide=Guide(framework.repository, framework.commit, framework.guide),
        notes=tuple(facts.notes),
        steps=tuple(dict.fromkeys(steps)),
    )


def _filled(template: Template, target: Target, facts: Facts) -> Iterator[Step]:
    """The steps that a template becomes: none, one, or one for each component that it is about."""
    kind, _, group = template.each.rpartition(":")
    pieces = facts.pieces(group, template.when) if group else ()
    if kind == "all":
        pieces = (facts.together(pieces),) if pieces else ()
    for piece in pieces or (() if group else (None,)):
        if facts.holds(template.when, piece):
            yield _step(template, target, facts, piece)


def _step(template: Template, target: Target, facts: Facts, piece: Piece | None) -> Step:
    texts = facts.texts(piece)
    creates, edits = (
        [_fill(path, facts.paths(piece)) for path in paths] for paths in (template.creates, template.edits)
    )
    done, shows = check(template.done, facts, piece, [*creates, *edits])
    text, why = _fill(template.text, texts), _fill(template.why, texts)
    if done:
        return Step(template.group, text, True, shows or why)
    here = [path for path in creates if facts.exists(path)]
    clash = target.commit and any(not path.endswith("__init__.py") for path in here)
    return Step(
        group=template.group,
        text=text,
        why="; ".join(part for part in (shows, why, _EXISTS if clash else "") if part),
        creates=tuple(path for path in creates if path not in here),
        edits=tuple(dict.fromkeys([*here, *edits])),
        command=_fill(template.command, facts.commands(piece)) or None,
    )


def _fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with its names filled in; empty where one of them has no value."""
    wanted = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    return text.format_map(values) if all(values[name] for name in wanted) else ""
