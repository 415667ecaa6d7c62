"""What the body of a class says, parsed and never run: its bases, its attributes, the defaults of its arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from porter.core.installed import class_block

_INFINITE = {"float('inf')": float("inf"), "-float('inf')": -float("inf")}


class Computed:
    """A default that is no literal: an expression of the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Computed) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def lineage(text: bytes, class_name: str) -> list[ast.ClassDef]:
    """The class and its base classes in the same file, bases first, so that the class's own values win."""
    found: list[ast.ClassDef] = []
    waiting = [class_name]
    while waiting and len(found) < 8:
        block = class_block(text, waiting.pop())
        try:
            nodes = ast.parse(block[1]).body if block else []
        except SyntaxError:
            nodes = []
        for node in nodes[:1]:
            if isinstance(node, ast.ClassDef) and node.name not in [known.name for known in found]:
                found.insert(0, node)
                waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return found


def fields_of(node: ast.ClassDef) -> dict[str, Any]:
    """Annotated class attributes with values: the fields of a dataclass."""
    return {
        part.target.id: value_of(part.value)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value is not None
    }


def arguments(function: ast.FunctionDef) -> tuple[dict[str, Any], list[str]]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)][1:]
    values: list[ast.expr | None] = [None] * (len(names) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(names, values, strict=True)] + [
        (argument.arg, value) for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return (
        {name: value_of(value) for name, value in pairs if value is not None},
        [name for name, value in pairs if value is None],
    )


def value_of(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        text = ast.unparse(node)
        return _INFINITE.get(text.replace('"', "'"), Computed(text))


def _statements(node: ast.ClassDef, name: str) -> Iterator[ast.expr]:
    """Values that a class's body gives to `name`."""
    for part in node.body:
        if not isinstance(part, ast.Assign | ast.AnnAssign) or part.value is None:
            continue
        targets = part.targets if isinstance(part, ast.Assign) else [part.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            yield part.value


def states(node: ast.ClassDef, name: str) -> bool:
    return any(True for _ in _statements(node, name))


def literal_of(node: ast.ClassDef, name: str) -> Any:
    found = next((value_of(value) for value in _statements(node, name)), None)
    return None if isinstance(found, Computed) else found


def names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple | set) else ()
