"""Cases by name: `FILE.py[:NAME]`, or `FAMILY[:NAME]` for those that come with a family of the catalogue."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from porter.core.errors import MissingError, UsageError
from porter.core.family import families


def case_file(name: str) -> str:
    """`FILE.py[:NAME]` of a case; a family's name is looked up in the catalogue. Nothing is imported.

    Raises:
        MissingError: no such file, and no family of that name.
        UsageError: the family has no case.
    """
    if ".py" in name or "/" in name:
        return name
    family, _, which = name.partition(":")
    known = families()
    if family not in known:
        near = get_close_matches(family, known, 1)
        raise MissingError(
            f"no case {name}", expected="FILE.py, FILE.py:NAME, FAMILY or FAMILY:NAME",
            found=f"no family {family}" + (f"; the nearest is {near[0]}" if near else ""), hint="porter families",
        )  # fmt: skip
    module = known[family].originals
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        raise UsageError(
            f"{family} has no case of its own",
            expected=", ".join(n for n, f in known.items() if f.originals),
            hint="porter parity PORT compares its recorded reference; docs/parity.md, A case of your own"
            if known[family].cases else "docs/parity.md, A case of your own",
        )  # fmt: skip
    return f"{spec.origin}:{which}" if which else spec.origin


@dataclass(frozen=True)
class Pinned:
    """The original code that a case file was run with: `REPOSITORY` and `COMMIT` in it, empty where it has none."""

    repository: str = ""
    commit: str = ""

    @classmethod
    def of(cls, name: str) -> Pinned:
        """Read from the text of `FILE.py[:NAME]`, which is not run; a file that cannot be read has none."""
        try:
            tree = ast.parse(Path(name.partition(".py")[0] + ".py").read_bytes())
        except (OSError, SyntaxError, ValueError):
            return cls()
        found = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        return cls(found.get("REPOSITORY", ""), found.get("COMMIT", ""))

    def __str__(self) -> str:
        return f"{self.repository} at {self.commit}" if self.commit else self.repository
