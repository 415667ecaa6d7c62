"""Imports that only a GPU has, with the same arithmetic in plain torch."""

from __future__ import annotations


def install() -> list[str]:
    """Make the stand-ins importable -> their names."""
    return []
