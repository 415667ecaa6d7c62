"""Recipes: rules between two layouts' tensor names, compiled against real headers before a byte is read.

A recipe is data. `compile_recipe` expands it over a source header and accounts for every tensor on both sides exactly
once; what it cannot account for is refused, by template, with the nearest names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from porter.core.accounting import Problems
from porter.core.checkpoint import ANY, Header, TensorInfo, dtype_code, spec
from porter.core.errors import RecipeError
from porter.core.files import check_counts
from porter.core.modulemap import ModulePair
from porter.core.ops import Constant, Drop, Op, castable
from porter.core.patterns import Pattern, Size, Value, evaluate, nearest
from porter.core.tensorplan import Coverage, Step, TensorPlan, cast_step, digest_of, make_step

__all__ = ["INPUTS", "OUTPUTS", "Coverage", "ModulePair", "Recipe", "Rule", "Shard", "TensorPlan", "compile_recipe"]

Config = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """How tensor-parallel ranks share a rule's targets.

    Attributes:
        dim: 0 shares the outputs of a linear layer (its bias with them), 1 its inputs (each rank has the whole bias).
        parts: sizes along `dim` of parts that are shared each by itself; a `Concat` says its parts without this.
    """

    dim: Literal[0, 1]
    parts: tuple[Size, ...] = ()


OUTPUTS, INPUTS = Shard(0), Shard(1)


@dataclass(frozen=True)
class Rule:
    """Source pattern(s) → ops → target pattern(s), and why.

    The first source pattern is matched against all names; further sources and the targets are filled in from its
    variables and the recipe's parameters. No targets and one `Drop` leave the sources out; no sources and one
    `Constant` make a target that the source layout does not have.
    `when` names a parameter, or an expression of them, that must not be 0 for the rule to exist. `shard` says how
    tensor-parallel ranks share the targets; without it each has them whole.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    ops: tuple[Op, ...] = ()
    why: str = "another name"
    when: str | None = None
    shard: Shard | None = None
    line: str = field(default="", compare=False, repr=False)  # where it is written: file:number

    def __post_init__(self) -> None:
        for name in ("sources", "targets"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "ops", (self.ops,) if isinstance(self.ops, Op) else tuple(self.ops))
        drops = [op for op in self.ops if isinstance(op, Drop)]
        constant = bool(self.ops) and isinstance(self.ops[0], Constant)
        undone = any(isinstance(op, _Undo) for op in self.ops)  # read backwards: a drop has no sources
        if not undone and (constant != (not self.sources) or bool(drops) != (not self.targets)):
            raise RecipeError(
                f"the rule for {self.sources or self.targets} is incomplete",
                expected="sources and targets, or sources and one Drop, or one Constant and targets",
                found=f"targets {self.targets}, ops {[op.describe() for op in self.ops]}",
            )  # fmt: skip
        if drops:
            object.__setattr__(self, "why", drops[0].reason)
        if not self.line:
            object.__setattr__(self, "line", _line_outside())

    @property
    def head(self) -> str:
        """The pattern that the rule is known by: its first source's, or its first target's where it has no source."""
        return (self.sources or self.targets)[0]

    @property
    def label(self) -> str:
        """The rule in one line."""
        ops = ", ".join(op.describe() for op in self.ops) or "rename"
        return f"{' + '.join(self.sources) or 'nothing'} → {', '.join(self.targets) or 'nothing'} ({ops})"

    def inverse(self) -> Rule:
        """This rule read backwards, for the account of an inverse plan."""
        undone = self.ops and isinstance(self.ops[0], _Undo)
        ops = self.ops[0].ops if undone else (_Undo(self.ops),) if self.ops else ()  # type: ignore[attr-defined]
        return replace(self, sources=self.targets, targets=self.sources, ops=ops)

    def canonical(self) -> dict[str, Any]:
        """This rule as JSON data: what it does, not why."""
        shared = {} if self.shard is None else {"shard": [self.shard.dim, self.shard.parts]}
        return {
            "sources": self.sources, "targets": self.targets, "ops": [op.canonical() for op in self.ops],
            "when": self.when, **shared,
        }  # fmt: skip


def _line_outside() -> str:
    """The line that the calls in progress came from, outside this module: `conversions/x/recipe.py:44`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "dataclasses"):
        frame = frame.f_back
    if frame is None:
        return "a rule"
    module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
    place = module.replace(".", "/") + ".py" if "." in module else Path(file).name
    return f"{place}:{frame.f_lineno}"


@dataclass(frozen=True)
class _Undo(Op):
    """Stands for a rule's inverted ops in an account; the steps hold the real ones."""

    ops: tuple[Op, ...]

    def describe(self) -> str:
        return "undo " + ", ".join(op.describe() for op in reversed(self.ops))


def _no_headers(config: Config, dtype: str = ANY) -> Header:
    raise RecipeError("this recipe does not say which tensors a config has", hint="give both headers")


def guarded(make: Callable[..., T]) -> Callable[..., T]:
    """`make(config, …)` with hostile configs refused: counts beyond any model, words for numbers, missing keys."""
    if make is _no_headers or hasattr(make, "__wrapped__"):
        return make

    @wraps(make)
    def made(config: Config, *more: str) -> T:
        check_counts(config, "the config")
        try:
            return make(config, *more)
        except KeyError as error:
            key = error.args[0] if error.args else ""
            if key in config:
                raise _undescribed(error) from error
            raise RecipeError(
                f"the config has no {key}", expected=f"{key}, which the recipe reads",
                found=", ".join(map(str, list(config)[:8])) or "no config",
                hint=f"give one with --config FILE, with {key} in it",
            ) from error  # fmt: skip
        except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            raise _undescribed(error) from error

    return made


def _undescribed(error: Exception) -> RecipeError:
    return RecipeError(
        "the config does not describe the tensors", expected="the keys and kinds of its class",
        found=f"{type(error).__name__}: {error}"[:200], hint="repair the component's config.json",
    )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything porter knows about moving one component's weights between two layouts.

    Args:
        name: unique in the catalogue, as `family-transformer`.
        source_layout, target_layout: words for people: `original`, `diffusers`.
        rules: see `Rule`.
        parameters: config → the numbers that sizes and `when` are written in.
        source_headers, target_headers: (config, dtype) → the exact tensors of each layout; pure, without torch. A
            config that they cannot read is a RecipeError.
        infer_config: (source header, what is known of the config) → the full config, refusing what it cannot know.
        keep_dtype: target patterns that a cast leaves as they are stored.
        target_class: `library.Class` of the target, for a layout that the catalogue does not know.
    """

    name: str
    source_layout: str
    target_layout: str
    rules: tuple[Rule, ...]
    parameters: Callable[[Config], Mapping[str, int]] = lambda config: {}
    source_headers: Callable[..., Header] = _no_headers
    target_headers: Callable[..., Header] = _no_headers
    infer_config: Callable[[Header, Config], dict[str, Any]] = lambda header, config: dict(config)
    keep_dtype: tuple[str, ...] = field(default=())
    target_class: str = ""

    def __post_init__(self) -> None:
        for name in ("parameters", "source_headers", "target_headers"):
            object.__setattr__(self, name, guarded(getattr(self, name)))

    @property
    def knows_sources(self) -> bool:
        """Whether the recipe says which tensors its source layout has."""
        return self.source_headers is not _no_headers

    @property
    def knows_targets(self) -> bool:
        """Whether the recipe says which tensors its target has; else only a strict load can tell what is missing."""
        return self.target_headers is not _no_headers

    @property
    def digest(self) -> str:
        """sha256 over the rules' canonical JSON: two recipes with one digest do the same."""
        rules = [rule.canonical() for rule in self.rules]
        return digest_of([self.name, self.source_layout, self.target_layout, rules, self.keep_dtype])

    def replace_rule(self, pattern: str, **changes: Any) -> Recipe:
        """A copy in which the rule whose first source pattern is `pattern` has other fields, as in `ops=()`.

        Raises:
            RecipeError: no rule, or several, start with that pattern.
        """
        index = self._index(pattern)
        rules = list(self.rules)
        rules[index] = replace(rules[index], **changes)
        return replace(self, rules=tuple(rules))

    def without_rule(self, pattern: str) -> Recipe:
        """A copy without the rule whose first source pattern is `pattern`."""
        index = self._index(pattern)
        return replace(self, rules=self.rules[:index] + self.rules[index + 1 :])

    def _index(self, pattern: str) -> int:
        found = [index for index, rule in enumerate(self.rules) if rule.head == pattern]
        if len(found) != 1:
            near = nearest(pattern, [rule.head for rule in self.rules])
            raise RecipeError(
                f"{self.name} has {len(found)} rules for {pattern!r}", expected="one", found=", ".join(near) or None
            )
        return found[0]


def compile_recipe(
    recipe: Recipe, config: Config, source: Header, target: Header | None = None, *, dtype: str | None = None
) -> TensorPlan:
    """Expand `recipe` over the tensors of `source` and account for every tensor of both sides.

    Args:
        config: the full config, as `recipe.infer_config` returns it.
        source: header of the original weights: a file's, or the recipe's own `source_headers(config, dtype)`.
        target: header that the result must have; default `recipe.target_headers(config)`, and where the recipe does not
            know them, whatever its rules make. A file's header makes the plan's inverse executable.
        dtype: cast floating-point tensors to this dtype, but for the recipe's `keep_dtype`; None keeps all.

    Raises:
        RecipeError: anything is not accounted for exactly once, or has another shape or dtype than expected.
    """
    parameters = recipe.parameters(config)
    expected = {} if target is None and not recipe.knows_targets else target
    expected = recipe.target_headers(config, ANY) if expected is None else expected
    wanted = dtype_code(dtype) if dtype is not None else None
    keep = [Pattern(text) for text in recipe.keep_dtype]
    problems = Problems(recipe, source, expected, parameters)
    if recipe.knows_sources:
        problems.compare(recipe.source_headers(config, ANY))
    steps: list[Step] = []
    for index, rule in enumerate(recipe.rules):
        if rule.when is not None and not evaluate(rule.when, parameters):
            continue
        matches = list(Pattern(rule.sources[0]).find(source, parameters)) if rule.sources else [("", {})]
        if not matches:
            problems.unmatched(rule)
        for name, values in matches:
            step = _expand(index, rule, name, values, parameters, source, problems, wanted, keep)
            if step is not None:
                steps.append(step)
    made = {output.name: spec(output.dtype, output.shape, output.name) for step in steps for output in step.outputs}
    if target is None and not recipe.knows_targets:
        expected = problems.target = made
    problems.check(steps)
    targets = {name: info if info.file else made[name] for name, info in expected.items()}
    digest = digest_of([recipe.digest, dict(parameters), wanted])
    return TensorPlan(
        recipe.name, recipe.source_layout, recipe.target_layout, source, targets, tuple(steps), recipe.rules,
        dict(parameters), digest,
    )  # fmt: skip


def _expand(
    index: int, rule: Rule, first: str, values: Mapping[str, Value], parameters: Mapping[str, int], source: Header,
    problems: Problems, dtype: str | None, keep: Sequence[Pattern],
) -> Step | None:  # fmt: skip
    """The step that a rule makes of one match; None (and a problem noted) where it cannot."""
    names = [first] if rule.sources else []
    for place, text in enumerate(rule.sources):
        filled = Pattern(text).fill_all(values, parameters) if place or ":each " in text else []
        names += filled if place else filled[1:]  # the first is what was found
    targets = [name for text in rule.targets for name in Pattern(text).fill_all(values, parameters)]
    for name in names:
        problems.claim(name, rule)
    absent = [name for name in names if name not in source]
    if absent:
        problems.absent(rule, absent[0])
        return None
    infos = [replace(source[name], name=name) for name in names]
    try:
        step = make_step(index, infos, rule.ops, targets, parameters)
        if dtype:
            olds = [(output.dtype, output.name) for output in step.outputs]
            kept = [not castable(old) or any(p.match(name, parameters) is not None for p in keep) for old, name in olds]
            cast = cast_step(olds, dtype, kept)
            if cast:
                step = make_step(index, infos, (*rule.ops, cast), targets, parameters)
    except RecipeError as error:
        problems.unfit(rule, first or targets[0], error)
        return None
    return step


def tensor_shape(header: Header, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that a config is read from.

    Raises:
        RecipeError: it is missing, or has another number of dims.
    """
    found: TensorInfo | None = header.get(name)
    if found is None:
        near = nearest(name, header)
        raise RecipeError(
            f"the tensor {name} is missing", expected=name, found=f"nearest: {', '.join(near) or 'none like it'}",
            hint="check that this is the right file of the model",
        )  # fmt: skip
    if len(found.shape) != rank:
        raise RecipeError(f"{name} has the wrong shape", expected=f"{rank} dims", found=str(list(found.shape)))
    return found.shape


def settle(component: str, known: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """`known` config completed by what the tensors show, `seen`.

    Raises:
        RecipeError: a key of the config says something else than the tensors.
    """
    for key, value in seen.items():
        given = known.get(key)
        given = tuple(given) if isinstance(given, list) else given
        if given is not None and given != (tuple(value) if isinstance(value, list) else value):
            raise RecipeError(
                f"{component}: the config's {key} does not fit the tensors",
                expected=f"{key}: {value} (from the tensors)",
                found=f"{key}: {known[key]} (from the config)", hint="give the right one with --config FILE",
            )  # fmt: skip
    return {**known, **seen}
