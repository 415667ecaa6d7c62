"""Write down which tensors a model class has: the facts by which `porter plan` knows architectures.

The class that wrote the checkpoints is built on the meta device (no memory, no weights), and its state dict is folded
into templates: `double_blocks.{}.img_attn.qkv.weight`, how often, and with which shapes. The statements that built it,
the code's version or commit, and the result go into `<family>/layouts.json`, so that anyone can make them again:

    python -m conversions.record_layouts conversions/flux1/layouts.json              # all that need no checkout
    python -m conversions.record_layouts conversions/flux1/layouts.json --repo black-forest-labs/flux=CHECKOUT

An entry is added by hand with `component`, `layout`, `class`, `code` and `build` (Python; the last line is the module,
or a dict of name -> shape); this command fills in `made` and `templates`. Modules named in `absent` (CUDA-only imports)
are replaced by empty ones while the code is imported. `drops` lists beginnings of names that files may have besides and
that the recipe leaves out, with what they are.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from porter.core.architectures import LAYOUTS_SCHEMA, fold


class Absent(ModuleType):
    """Stands for a module that cannot be imported here; whatever is taken from it can be called and does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *values: Any, **_: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else None  # as a decorator: the function itself


def built(code: str) -> Any:
    """Run `code` under the meta device; the value of its last line."""
    import torch

    tree = ast.parse(code)
    last = tree.body.pop()
    if not isinstance(last, ast.Expr):
        raise SystemExit("the last line of `build` must be an expression")
    space: dict[str, Any] = {"torch": torch}
    with torch.device("meta"):
        exec(compile(tree, "<build>", "exec"), space)
        return eval(compile(ast.Expression(last.value), "<build>", "eval"), space)


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that a checkpoint of `module` holds."""
    if isinstance(module, Mapping):
        return {str(name): tuple(getattr(shape, "shape", shape)) for name, shape in module.items()}
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def record(entry: dict[str, Any], checkouts: Mapping[str, Path]) -> bool:
    """Fill in one entry; False where it needs a checkout that is not here."""
    code = entry["code"]
    if "/" in code and code not in checkouts:
        return False
    if "/" in code:
        folder = checkouts[code]
        sys.path.insert(0, str(folder / entry.get("path", "")))
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        made = f"{code} at {commit.stdout.strip()}"
    else:
        try:
            made = f"{code} {version(code)}"
        except PackageNotFoundError:
            raise SystemExit(f"{code} is not installed") from None
    for name in entry.get("absent", ()):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = Absent(name)
    found = shapes(built(entry["build"]))
    entry["made"] = made
    entry["templates"] = {template: [[count, list(shape)] for shape, count in kinds.items()]
                          for template, kinds in fold(found).items()}  # fmt: skip
    return True


def dump(document: dict[str, Any]) -> str:
    """JSON with one template a line."""
    lines = ["{", f' "schema": {json.dumps(document["schema"])},', ' "layouts": [']
    for number, entry in enumerate(document["layouts"]):
        head = {key: value for key, value in entry.items() if key != "templates"}
        lines.append("  " + json.dumps(head, indent=3, ensure_ascii=False)[:-2].replace("\n", "\n  ") + ",")
        lines.append('     "templates": {')
        rows = [f"      {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in entry.get("templates", {}).items()]
        lines += [row + "," for row in rows[:-1]] + rows[-1:]
        lines.append("     }")
        lines.append("  }" + ("," if number + 1 < len(document["layouts"]) else ""))
    return "\n".join([*lines, " ]", "}"]) + "\n"


def read(file: Path) -> dict[str, Any]:
    """A family's layouts; ends the program where the file is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {file}: {error.strerror}; next: ls conversions/*/layouts.json") from None
    except ValueError as error:
        raise SystemExit(f"{file} is not valid JSON: {error}; next: git checkout {file}") from None
    if not isinstance(document, dict) or document.get("schema") != LAYOUTS_SCHEMA:
        raise SystemExit(f"{file} is no {LAYOUTS_SCHEMA}; next: ls conversions/*/layouts.json")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m conversions.record_layouts", description=__doc__)
    parser.add_argument("file", type=Path, help="a family's layouts.json")
    parser.add_argument("--repo", action="append", default=[], metavar="OWNER/NAME=DIR", help="checkout of the code")
    parser.add_argument("--only", metavar="CLASS", help="only entries of this class")
    options = parser.parse_args()
    checkouts = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.repo)}
    document = read(options.file)
    for name, folder in checkouts.items():
        if not (name and folder.is_dir()):
            raise SystemExit(
                f"--repo {name}={folder}: expected OWNER/NAME=DIR with a checkout in DIR; next: git clone it"
            )
    for entry in document["layouts"]:
        if options.only in (None, entry["class"]):
            done = record(entry, checkouts)
            print(
                f"{entry['component']} {entry['layout']} {entry['class']}: {entry['made'] if done else 'left as it is'}"
            )
    options.file.write_text(dump(document), encoding="utf-8")


if __name__ == "__main__":
    main()
