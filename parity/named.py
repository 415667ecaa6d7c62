"""Cases by name: `FILE.py[:NAME]`, or `FAMILY[:NAME]` for those that come with a family of the catalogue."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from parity.casename import split_case
from porter.core.errors import MissingError, UsageError
from porter.core.family import families


def case_file(name: str) -> str:
    """`FILE.py[:NAME]` of a case; a family's name is looked up in the catalogue. Nothing is imported.

    Raises:
        MissingError: no such file, and no family of that name.
        UsageError: the family has no case.
    """
    if ".py" in name or "/" in name:
        file, _ = split_case(name)
        if not file.is_file():
            raise MissingError(f"no such case file: {name}", expected="CASE.py or CASE.py:NAME", hint="docs/parity.md")
        return name
    family, _, which = name.partition(":")
    known = families()
    if family not in known:
        near = get_close_matches(family, known, 1)
        raise MissingError(
            f"no case {name}", expected="FILE.py, FILE.py:NAME, FAMILY or FAMILY:NAME",
            found=f"no family {family}" + (f"; the nearest is {near[0]}" if near else ""), hint="porter families",
        )  # fmt: skip
    cases = cases_of(family)
    if not cases:
        raise UsageError(
            f"{family} has no case of its own",
            expected=", ".join(n for n, f in known.items() if f.originals),
            hint="porter parity PORT compares its recorded reference; docs/parity.md, A case of your own"
            if known[family].cases else "docs/parity.md, A case of your own",
        )  # fmt: skip
    chosen = which or (next(iter(cases)) if len(cases) == 1 else "")
    if chosen not in cases:
        raise UsageError(
            f"{family} has {f'no case {which}' if which else 'several cases'}", expected=" | ".join(cases),
            hint=f"porter parity --case {family}:{next(iter(cases))}",
        )  # fmt: skip
    return f"{cases[chosen]}:{chosen}"


def cases_of(family: str) -> dict[str, Path]:
    """A family's cases against original code: their names -> their files."""
    specs = [importlib.util.find_spec(module) for module in families()[family].originals]
    files = [Path(spec.origin) for spec in specs if spec and spec.origin]
    return {case: file for file in files for case in Pinned.of(file).cases}


@dataclass(frozen=True)
class Pinned:
    """What a case file says of the original code that it was run with, by constants of its own; empty where it is not.

    Attributes:
        repository, commit: `REPOSITORY` and `COMMIT`.
        source: `SOURCE`, the folder of the checkout that its code is imported from.
        cases: names that `Case(…)` or `replace(…)` is assigned to.
    """

    repository: str = ""
    commit: str = ""
    source: str = ""
    cases: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str | Path) -> Pinned:
        """Read from the text of `FILE.py[:NAME]`, which is not run; a file that cannot be read says nothing."""
        try:
            tree = ast.parse(split_case(str(name))[0].read_bytes())
        except (OSError, SyntaxError, ValueError):
            return cls()
        found: dict[str, str] = {}
        cases: list[str] = []
        for node in (n for n in tree.body if isinstance(n, ast.Assign)):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=False) if several else [(target, value)]  # type: ignore[attr-defined]
            for left, right in pairs:
                if isinstance(left, ast.Name) and isinstance(right, ast.Constant) and isinstance(right.value, str):
                    found[left.id] = right.value
            if isinstance(target, ast.Name) and isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                cases += [target.id] if value.func.id in ("Case", "replace") else []
        repository, commit, source = (found.get(key, "") for key in ("REPOSITORY", "COMMIT", "SOURCE"))
        return cls(repository, commit, source, tuple(cases))

    def folder(self, checkout: Path) -> Path:
        """Where the code is imported from: `SOURCE` of a checkout, or the folder itself where it is named already."""
        inner = checkout.absolute() / self.source
        return checkout if not inner.is_dir() and checkout.absolute().match(self.source or "/") else inner

    def require(self, shown: str, checkout: Path | None, *, recorded: bool = False) -> None:
        """Refuse to run original code that is not there; raises UsageError.

        Args:
            shown: the case, as the user named it.
            recorded: whether a trace stands in for it.
        """
        if self.repository and checkout is None and not recorded:
            raise UsageError(
                f"{shown} runs the original code", expected=f"a checkout of {self}", hint="--reference-repo <checkout>"
            )

    def __str__(self) -> str:
        return f"{self.repository} at {self.commit}" if self.commit else self.repository
