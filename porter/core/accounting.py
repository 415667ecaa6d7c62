"""Exactly once: comparing what a recipe's rules claimed and made with the headers of both sides."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from porter.core.checkpoint import ANY, Header
from porter.core.errors import RecipeError
from porter.core.patterns import nearest, template
from porter.core.tensorplan import Step

if TYPE_CHECKING:
    from porter.core.recipe import Recipe, Rule

_SHOWN = 6  # kinds of problem that an error spells out


class Problems:
    """Collects what a recipe leaves open, and refuses it in one error."""

    def __init__(self, recipe: Recipe, source: Header, target: Header) -> None:
        self.recipe, self.source, self.target = recipe, source, target
        self.claims: dict[str, list[Rule]] = defaultdict(list)
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)  # (kind, detail) → names
        self.broken = False  # a step could not be made, so its targets are rightly absent

    def claim(self, name: str, rule: Rule) -> None:
        self.claims[name].append(rule)

    def compare(self, layout: Header) -> None:
        """Note what the source lacks of its layout, in the words of the source."""
        extra = [name for name in self.source if name not in layout]
        for name, want in layout.items():
            have = self.source.get(name)
            if have is None:
                self.broken = True
                self.found["missing from the source", self._near(name, extra)].append(name)
            elif have.shape != want.shape:
                self.broken = True
                self.found["wrong shape in the source", f"expected {_show(want)}, found {_show(have)}"].append(name)

    def unmatched(self, rule: Rule) -> None:
        near = self._near(rule.head, self.source)
        self.found["the rule matches no tensor", near].append(rule.head)

    def absent(self, rule: Rule, name: str) -> None:
        self.broken = True
        self.found["missing from the source", self._near(name, self.source)].append(name)

    def unfit(self, name: str, error: RecipeError) -> None:
        self.broken = True
        self.found[error.what, f"expected {error.expected}, found {error.found}"].append(name)

    def check(self, steps: Iterable[Step]) -> None:
        """Compare the steps with both headers; raise if anything is open."""
        makers: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            for output in step.outputs:
                makers[output.name].append(step)
                want = self.target.get(output.name)
                if want is None:
                    continue
                if want.shape != output.shape or want.dtype not in (ANY, output.dtype):
                    detail = f"expected {_show(want)}, found {_show(output)} from {' + '.join(step.sources)}"
                    kind = "wrong shape" if want.shape != output.shape else "wrong dtype"
                    self.found[kind, detail].append(output.name)
        unmade = [name for name in self.target if name not in makers]
        unclaimed = [name for name in self.source if name not in self.claims]
        for name in unclaimed:
            self.found["no rule claims the source tensor", ""].append(name)
        for name in unmade if not self.broken else ():
            self.found["nothing makes the target tensor", ""].append(name)
        for name, rules in self.claims.items():
            if len(rules) > 1:
                self.found["claimed by several rules", "; ".join(rule.label for rule in rules)].append(name)
        for name, steps_of in makers.items():
            if len(steps_of) > 1:
                made_of = " and ".join(step.sources[0] if step.sources else "nothing" for step in steps_of)
                self.found["made by several rules", made_of].append(name)
            if name not in self.target:
                self.found["made, but the target has no such tensor", self._near(name, unmade)].append(name)
        if self.found:
            raise self._error(unclaimed, unmade)

    def _error(self, unclaimed: list[str], unmade: list[str]) -> RecipeError:
        groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for (kind, detail), names in self.found.items():
            for name in names:
                groups[kind, template(name)].append((name, detail))
        lines = []
        for (kind, shape), members in list(groups.items())[:_SHOWN]:
            name, detail = members[0]
            if kind == "no rule claims the source tensor":
                detail = self._near(name, [rule.head for rule in self.recipe.rules])
            elif kind == "nothing makes the target tensor":
                detail = self._near(name, unclaimed or self.source)
            count = f"{len(members)} tensors {shape}, the first {name}" if len(members) > 1 else name
            lines.append(f"{kind}: {count}" + (f" ({detail})" if detail else ""))
        more = f"; and {len(groups) - _SHOWN} more kinds" if len(groups) > _SHOWN else ""
        return RecipeError(
            f"recipe {self.recipe.name} does not account for every tensor: " + "; ".join(lines) + more,
            expected=f"{len(self.source)} source and {len(self.target)} target tensors, each exactly once",
            found=f"{len(unclaimed)} unclaimed, {len(unmade)} not made, {len(groups)} kinds of problem",
            hint="check that the file and its config.json belong together, or give --config or --recipe",
        )

    @staticmethod
    def _near(name: str, candidates: Iterable[str]) -> str:
        near = nearest(name, candidates)
        return f"nearest: {', '.join(near)}" if near else ""


def _show(thing: Any) -> str:
    return json.dumps(list(thing.shape)) + ("" if thing.dtype == ANY else f" {thing.dtype}")
