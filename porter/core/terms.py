"""The terms of a source: what its card or the hub declares, and the files that hold the text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from porter.core.source import Source

TERMS = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)[^/]*", re.IGNORECASE)
_DECLARED = ("license", "license_name", "license_link")


def terms(source: Source) -> tuple[dict[str, Any], str | None]:
    """(licence, gate): the declared licence with the files of terms, and how the source is gated."""
    declared = source.declared
    licence = {key: declared[key] for key in _DECLARED if declared.get(key)}
    files = [name for name in source.files if TERMS.fullmatch(name)]
    if files:
        licence["files"] = files
    gate = declared.get("gated")
    return licence, None if not gate else str(gate) if isinstance(gate, str) else "yes"


def stated(licence: Mapping[str, Any]) -> str | None:
    """The name of a declared licence: its own where it has one, else the identifier."""
    name = licence.get("license_name") or licence.get("license")
    return str(name) if name else None
