"""Exactly once: comparing what a recipe's rules claimed and made with the headers of both sides."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from porter.core.checkpoint import ANY, Header, floating
from porter.core.errors import RecipeError
from porter.core.patterns import Pattern, evaluate, nearest, template
from porter.core.tensorplan import Step

if TYPE_CHECKING:
    from porter.core.recipe import Recipe, Rule

_SHOWN = 6  # kinds of problem that an error spells out
_LONG = 200  # characters of a tensor's name that an error shows
_MISSING = "missing from the source"


@dataclass(frozen=True)
class _Problem:
    kind: str
    name: str
    detail: str = ""
    rules: tuple[Rule, ...] = ()


class Problems:
    """Collects what a recipe leaves open, and refuses it in one error."""

    def __init__(self, recipe: Recipe, source: Header, target: Header, parameters: Mapping[str, int]) -> None:
        self.recipe, self.source, self.target, self.parameters = recipe, source, target, parameters
        self.claims: dict[str, list[Rule]] = defaultdict(list)
        self.found: list[_Problem] = []
        self.broken = False  # a step could not be made, so its targets are rightly absent
        self.layout: Header = {}  # what the source should hold, where the recipe knows
        self.misshapen: set[str] = set()

    def claim(self, name: str, rule: Rule) -> None:
        self.claims[name].append(rule)

    def compare(self, layout: Header) -> None:
        """Note what the source lacks of its layout, in the words of the source."""
        self.layout = layout
        for name, want in layout.items():
            have = self.source.get(name)
            if have is None:
                self.broken = True
                self._note(_MISSING, name)
            elif have.shape != want.shape:
                self.broken = True
                self.misshapen.add(name)
                self._note("wrong shape in the source", name, f"expected {_show(want)}, found {_show(have)}")

    def unmatched(self, rule: Rule) -> None:
        self._note("the rule matches no tensor", rule.head, self._near(rule.head, self.source), rule)

    def absent(self, rule: Rule, name: str) -> None:
        self.broken = True
        self._note(_MISSING, name, "", rule)

    def unfit(self, rule: Rule, name: str, error: RecipeError) -> None:
        self.broken = True
        self._note(error.what, name, f"expected {error.expected}, found {error.found}", rule)

    def check(self, steps: Iterable[Step]) -> None:
        """Compare the steps with both headers; raise if anything is open."""
        makers: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            for name in step.sources if step.outputs else ():
                self._mistyped(name)
            for output in step.outputs:
                makers[output.name].append(step)
                want = self.target.get(output.name)
                if want is None or not self.misshapen.isdisjoint(step.sources):
                    continue
                if want.shape != output.shape or want.dtype not in (ANY, output.dtype):
                    detail = f"expected {_show(want)}, found {_show(output)} from {' + '.join(step.sources)}"
                    kind = "wrong shape" if want.shape != output.shape else "wrong dtype"
                    self._note(kind, output.name, detail, self.recipe.rules[step.rule])
        unmade = [name for name in self.target if name not in makers]
        unclaimed = [name for name in self.source if name not in self.claims]
        for name in unclaimed:
            self._note("no rule claims the source tensor", name)
        kin = {template(name): self.recipe.rules[steps[0].rule] for name, steps in makers.items()}
        for name in unmade if not self.broken else ():
            made_by = kin.get(template(name))
            self._note("nothing makes the target tensor", name, "", *([made_by] if made_by else []))
        for name, rules in self.claims.items():
            if len(rules) > 1:
                self._note("claimed by several rules", name, "", *rules)
        for name, steps_of in makers.items():
            by = [self.recipe.rules[step.rule] for step in steps_of]
            if len(steps_of) > 1:
                made_of = " and ".join(step.sources[0] if step.sources else "nothing" for step in steps_of)
                self._note("made by several rules", name, made_of, *by)
            if name not in self.target:
                self._note("made, but the target has no such tensor", name, self._near(name, unmade), *by)
        if self.found:
            raise self._error(unclaimed, unmade)

    def _mistyped(self, name: str) -> None:
        """Note a tensor that is kept and holds no weights; what a rule drops may be a buffer of integers."""
        want, have = self.layout.get(name), self.source[name]
        if want is not None and want.dtype == ANY and not floating(have.dtype):
            detail = f"expected {_show(want)} of a floating-point dtype, found {_show(have)}"
            self._note("wrong dtype in the source", name, detail)

    def _note(self, kind: str, name: str, detail: str = "", *rules: Rule) -> None:
        self.found.append(_Problem(kind, name, detail, rules))

    def _error(self, unclaimed: list[str], unmade: list[str]) -> RecipeError:
        groups: dict[tuple[str, str], list[_Problem]] = defaultdict(list)
        for problem in self.found:
            groups[problem.kind, template(problem.name)].append(problem)
        lines = []
        for (kind, shape), members in list(groups.items())[:_SHOWN]:
            names = list(dict.fromkeys(problem.name for problem in members))
            name, detail, rules = names[0], members[0].detail, members[0].rules
            if kind == "no rule claims the source tensor":
                detail = self._near(name, [rule.head for rule in self.recipe.rules])
            elif kind in (_MISSING, "nothing makes the target tensor"):
                detail = self._near(name, unclaimed or self.source)
            shown = _short(name)
            count = f"{len(names)} tensors {_short(shape)}, the first {shown}" if len(names) > 1 else shown
            lines.append(f"{kind}: {count}" + (f" ({detail})" if detail else ""))
            for rule in dict.fromkeys(rules or self._claimant(name)):
                off = rule.when is not None and not evaluate(rule.when, self.parameters)
                lines.append(
                    f"  {rule.line}: {rule.label}" + (f", off for this config: {rule.when} is 0" if off else "")
                )
        if len(groups) > _SHOWN:
            lines.append(f"and {len(groups) - _SHOWN} more kinds")
        text = "\n".join(line.replace("\n", "\\n") for line in lines)  # a name's own lines never look like ours
        wanted = f"{len(self.layout or self.source)} source and {len(self.target)} target tensors"
        held = f"{len(self.source)} in the source, {len(unclaimed)} unclaimed"
        return RecipeError(
            f"recipe {self.recipe.name} does not account for every tensor\n{text}",
            expected=f"{wanted}, each exactly once",
            found=f"{held}, {len(unmade)} not made, {len(groups)} kinds of problem",
            hint="check that the file and its config.json belong together, or give --config or --recipe",
        )

    def _claimant(self, name: str) -> tuple[Rule, ...]:
        """The rule that takes a source tensor of this name, wherever one does."""
        for rule in self.recipe.rules:
            if rule.sources and Pattern(rule.sources[0]).match(name, self.parameters) is not None:
                return (rule,)
        return ()

    @staticmethod
    def _near(name: str, candidates: Iterable[str]) -> str:
        near = nearest(name, candidates)
        return f"nearest: {', '.join(map(_short, near))}" if near else ""


def _short(name: str) -> str:
    return name if len(name) <= _LONG else f"{name[:_LONG]}… ({len(name)} characters)"


def _show(thing: Any) -> str:
    return json.dumps(list(thing.shape)) + ("" if thing.dtype == ANY else f" {thing.dtype}")
