"""JSON as configurations have it, and no more: what is parsed here, everything after it can print, count and walk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

MAX_NESTING = 100
MAX_TEXT = 1 << 20  # characters of one text; chat templates take 20,000
MAX_NUMBER = 2**63
# What transformers writes for "no limit" (`int(1e30)`, the `model_max_length` of many tokenizers).
_NO_LIMIT = int(1e30)


def parse_json(raw: bytes, *, constants: bool = False) -> Any:
    """The document in `raw`.

    Args:
        constants: whether NaN and the infinities may stand in it.

    Raises:
        ValueError: it is not JSON; a key stands in an object twice; a number that no float or 64-bit integer holds;
            half a character; more than 100 levels; a text of more than 1 MB.
        RecursionError: it is nested deeper than Python's stack.
    """
    document = json.loads(
        raw, object_pairs_hook=_unique, parse_int=_integer, parse_float=float if constants else _real,
        parse_constant=float if constants else _no_number,
    )  # fmt: skip
    _check(document)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!a} stands in it twice")
    return found


def _integer(word: str) -> int:
    if len(word) < 19:
        return int(word)
    if len(word) > 40 or (abs(value := int(word)) > MAX_NUMBER and value != _NO_LIMIT):
        raise ValueError(f"the number {word[:24]}… of {len(word)} digits")
    return value


def _real(word: str) -> float:
    if math.isinf(value := float(word)):
        raise ValueError(f"the number {word[:24]} is too large for a float")
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _check(document: Any) -> None:
    """Nesting and texts, without a stack of our own deeper than the limit."""
    levels: list[Iterator[Any]] = [iter((document,))]
    while levels:
        for value in levels[-1]:
            if isinstance(value, str):
                if len(value) > MAX_TEXT:
                    raise ValueError(f"a text of {len(value)} characters, {value[:40]!a}…")
                if not value.isascii():
                    value.encode()  # refuses a lone surrogate, which nothing could print
            elif isinstance(value, dict | list):
                if len(levels) > MAX_NESTING:
                    raise ValueError(f"more than {MAX_NESTING} levels inside each other")
                levels.append(_inside(value))
                break
        else:
            levels.pop()


def _inside(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value  # its keys are texts as well
        yield from value.values()
    else:
        yield from value
