"""Frozen records and their JSON: the check that a document has every key of a record and no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from porter.core.errors import BadInputError, visible


def check_keys(pairs: Iterable[tuple[type, Any]], what: str, hint: str) -> None:
    """Refuse a document whose tables are not those of the records.

    Args:
        pairs: (dataclass, table that shall become one).
        what: the document, in words.

    Raises:
        BadInputError: a table that is none, a missing or an unknown key.
    """
    for kind, given in pairs:
        if not isinstance(given, Mapping):
            raise BadInputError(
                f"a damaged {what}", expected=f"a table ({kind.__name__})", found=repr(given)[:60], hint=hint
            )
        if odd := {field.name for field in fields(kind)} ^ set(given):
            found = visible(", ".join(sorted(map(str, odd))))[:300]
            raise BadInputError(f"a {what} with missing or unknown keys", found=found, hint=hint)
