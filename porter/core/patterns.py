"""Anchored, typed patterns of tensor names, and the small arithmetic of sizes and indices.

A pattern matches a whole name or nothing. Between literal text it holds variables in braces:

    {i:int}             an index: decimal digits without leading zeros
    {i:int==n-1}        an index equal to an expression; also < > <= >= !=
    {p:weight|bias}     one of the listed words
    {p:q=to_q|k=to_k}   one of the words on the left; filled in, it becomes the one on its right
    {i} {n-1-i}         in a target, or in a further source: a variable, or an expression of indices and parameters
    {i:each n}          one name for each i from 0 to n-1; in a first source, the group is found by its index 0
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from porter.core.errors import RecipeError

Value = int | str
Size = int | str  # a number, or an expression of the recipe's parameters: "h", "4*h"

_BRACES = re.compile(r"\{([^{}]*)\}")
_TYPED = re.compile(r"([A-Za-z_]\w*):(.+)")
_INDEX = re.compile(r"int(?:(==|!=|<=|>=|<|>)(.+))?")
_MAX_EACH = 100_000  # names that one pattern may make
_EACH = re.compile(r"each (.+)")
_INT = r"(0|[1-9][0-9]{0,8})"
_NUMBER = re.compile(_INT)
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(expression: Size, variables: Mapping[str, Value]) -> int:
    """The value of an integer expression: numbers, variables, + - * // % and parentheses.

    Raises:
        RecipeError: it is not such an expression, or names an unknown variable.
    """
    if isinstance(expression, int):
        return expression
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body, variables)
    except (SyntaxError, TypeError, ZeroDivisionError, KeyError) as error:
        known = ", ".join(name for name, value in variables.items() if isinstance(value, int)) or "none"
        raise RecipeError(
            f"cannot evaluate {expression!r}", expected=f"numbers and the parameters {known}", found=str(error)
        ) from None


def _evaluate(node: ast.expr, variables: Mapping[str, Value]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        value = variables[node.id]
        if isinstance(value, int):
            return int(value)
        raise TypeError(f"{node.id} is a word")
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_evaluate(node.left, variables), _evaluate(node.right, variables))
    raise TypeError(f"{type(node).__name__} is not allowed")


@dataclass(frozen=True)
class Pattern:
    """One pattern of tensor names; see the module's text for its language."""

    text: str

    @cached_property
    def _compiled(
        self,
    ) -> tuple[re.Pattern[str], dict[str, tuple[str, str] | None], dict[str, dict[str, str]]]:
        """The anchored regular expression; for each index variable its bound (comparison, expression); word → word."""
        regex, bounds, position = "", dict[str, tuple[str, str] | None](), 0
        words: dict[str, dict[str, str]] = {}
        for match in _BRACES.finditer(self.text):
            regex += re.escape(self.text[position : match.start()])
            position = match.end()
            typed = _TYPED.fullmatch(match[1])
            if typed is None or typed[1] in bounds or f"(?P<{typed[1]}>" in regex:
                raise RecipeError(
                    f"the pattern {self.text!r} cannot be matched", expected="{name:int} or {name:a|b}, each name once",
                    found="{" + match[1] + "}",
                )  # fmt: skip
            name, kind = typed.groups()
            index = _INDEX.fullmatch(kind)
            if index or _EACH.fullmatch(kind):
                bounds[name] = ("==", "0") if not index else (index[1], index[2]) if index[1] else None
                regex += f"(?P<{name}>{_INT[1:-1]})"
            else:
                pairs = [word.partition("=") for word in kind.split("|")]
                words[name] = {left: right if equals else left for left, equals, right in pairs}
                regex += f"(?P<{name}>{'|'.join(re.escape(word) for word in words[name])})"
        regex += re.escape(self.text[position:])
        return re.compile(regex), bounds, words

    def match(self, name: str, parameters: Mapping[str, int]) -> dict[str, Value] | None:
        """The variables' values if the whole name fits, else None."""
        regex, bounds, words = self._compiled
        match = regex.fullmatch(name)
        if match is None:
            return None
        values: dict[str, Value] = {}
        for key, text in match.groupdict().items():
            values[key] = int(text) if key in bounds else words[key][text]
        for key, bound in bounds.items():
            if bound and not _COMPARE[bound[0]](int(values[key]), evaluate(bound[1], parameters)):
                return None
        return values

    def find(self, names: Iterable[str], parameters: Mapping[str, int]) -> Iterator[tuple[str, dict[str, Value]]]:
        """All names that fit, with their variables, in the order given."""
        for name in names:
            values = self.match(name, parameters)
            if values is not None:
                yield name, values

    def fill(self, values: Mapping[str, Value], parameters: Mapping[str, int]) -> str:
        """The name that the variables make of this pattern.

        Raises:
            RecipeError: a variable is unknown, or an index comes out negative.
        """

        def one(match: re.Match[str]) -> str:
            inside = match[1].split(":", 1)[0]
            value = values.get(inside)
            if value is None:
                value = evaluate(inside, {**parameters, **values})
                if value < 0:
                    raise RecipeError(f"{self.text!r} gives a negative index", expected="0 or more", found=str(value))
            return str(value)

        return _BRACES.sub(one, self.text)

    def fill_all(self, values: Mapping[str, Value], parameters: Mapping[str, int]) -> list[str]:
        """All names that the variables make of this pattern: several where it says `each`.

        Raises:
            RecipeError: as `fill`.
        """
        counts = {
            typed[1]: evaluate(each[1], {**parameters, **values})
            for match in _BRACES.finditer(self.text)
            if (typed := _TYPED.fullmatch(match[1])) and (each := _EACH.fullmatch(typed[2]))
        }
        if not counts:
            return [self.fill(values, parameters)]
        if max(*counts.values(), math.prod(counts.values())) > _MAX_EACH:
            raise RecipeError(f"{self.text!r} gives too many names", expected=f"at most {_MAX_EACH}", found=f"{counts}")
        indices = product(*(range(count) for count in counts.values()))
        return [self.fill({**values, **dict(zip(counts, index, strict=True))}, parameters) for index in indices]


def template(name: str) -> str:
    """A name with each index replaced by `*`: what the same tensor of all blocks has in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like `name`, best first, for "did you mean" messages."""
    return difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=count, cutoff=0.4)


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many blocks `prefix.0`, `prefix.1` … there are.

    Raises:
        RecipeError: an index is missing between 0 and the last.
    """
    start = prefix + "."
    found = {name[len(start) :].split(".", 1)[0] for name in names if name.startswith(start)}
    indices = {int(index) for index in found if _NUMBER.fullmatch(index)}
    hole = next(index for index in range(len(indices) + 1) if index not in indices)
    if hole < len(indices):
        raise RecipeError(
            f"{prefix}.{hole} is missing", expected=f"{prefix}.0 to {prefix}.{max(indices)}",
            found=f"{len(indices)} of {max(indices) + 1} blocks", hint="download or export the file again",
        )  # fmt: skip
    return len(indices)
