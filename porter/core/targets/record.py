"""Records which classes and models a framework has: `python -m porter.core.targets.record TARGET CHECKOUT --commit C`.

Reads the checkout's source text with `ast` and imports none of it. Two ways to register are known: a library that
exports classes of certain bases, and modules that list theirs in `EntryClass` (with other names in `_aliases`), whose
published models stand in `register_configs(hf_model_paths=[...])`.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from porter.core.errors import BadInputError, MissingError, PorterError
from porter.core.targets import INVENTORY_SCHEMA, TARGETS

_SGLANG = "python/sglang/multimodal_gen"
# Where each framework keeps components, pipelines and the table of published models. The order is the order of trust:
# a class that two files define is the first one's.
PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "diffusers": {
        "classes": (
            *(f"src/diffusers/models/{kind}/*.py" for kind in ("transformers", "unets", "autoencoders", "controlnets")),
            *("src/diffusers/models/*.py", "src/diffusers/schedulers/*.py", "src/diffusers/guiders/*.py"),
            "src/diffusers/pipelines/**/*.py",
        ),
        "pipelines": ("src/diffusers/pipelines/**/*.py", "src/diffusers/modular_pipelines/**/*.py"),
    },
    "sglang": {
        "classes": (f"{_SGLANG}/runtime/models/*/*.py",),
        "pipelines": (f"{_SGLANG}/runtime/pipelines/*.py",),
        "models": (f"{_SGLANG}/configs/pipeline_configs/*.py",),
    },
    "fastvideo": {
        "classes": ("fastvideo/models/**/*.py",),
        "pipelines": ("fastvideo/pipelines/basic/**/*.py",),
        "models": ("fastvideo/registry.py",),
    },
}
# Which files a checklist may name: with these, a step knows whether it creates a file or edits one.
TREES: dict[str, tuple[str, ...]] = {
    "diffusers": (
        *(
            "src/diffusers/*.py",
            "scripts/*.py",
            "utils/*.py",
            "Makefile",
            ".ai/**/*.md",
            ".github/ISSUE_TEMPLATE/*.yml",
        ),
        *(
            f"src/diffusers/{room}/**/*.py"
            for room in ("models", "schedulers", "loaders", "pipelines", "modular_pipelines")
        ),
        *(f"tests/{room}/**/*.py" for room in ("models", "schedulers", "pipelines", "modular_pipelines")),
        *("docs/source/en/_toctree.yml", "docs/source/en/api/*/*.md"),
    ),
    "sglang": (
        *(f"{_SGLANG}/{room}/**/*.py" for room in ("configs", "runtime/models", "runtime/pipelines")),
        *(f"{_SGLANG}/{room}/**/*.py" for room in ("runtime/pipelines_core", "test/server", "test/single_test_file")),
        *(f"{_SGLANG}/{file}" for file in ("registry.py", "test/run_suite.py", "test/unit/test_*.py")),
        f"{_SGLANG}/.agents/skills/sglang-diffusion-add-model/**/*.md",
    ),
    "fastvideo": (
        *(f"fastvideo/{room}/**/*.py" for room in ("api", "configs", "models", "pipelines", "tests/ssim")),
        *("fastvideo/*.py", "tests/local_tests/**/*", "examples/inference/basic/*.py", "docs/inference/*.md"),
        *("scripts/checkpoint_conversion/*", ".agents/skills/add-model*/**/*", "docs/contributing/*.md"),
    ),
}
# Folders whose registry.py lists further names by hand.
_TABLES = {"sglang": f"{_SGLANG}/runtime/models", "fastvideo": "fastvideo/models"}
_BASES = ("ModelMixin", "PreTrainedModel", "SchedulerMixin", "BaseGuidance")


def main() -> None:
    """Writes `<target>.classes.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[target for target in TARGETS if target in PLACES])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--commit", required=True, help="commit or tag of the checkout")
    given = parser.parse_args()
    try:
        check_commit(given.checkout, given.commit)
        document = inventory(given.target, given.checkout, given.commit)
    except PorterError as error:
        raise SystemExit(f"error: {error}") from None
    (Path(__file__).parent / f"{given.target}.classes.json").write_text(_laid_out(document), "utf-8")
    print({key: len(value) for key, value in document.items() if isinstance(value, dict)})


def check_commit(checkout: Path, commit: str) -> None:
    """Refuses a folder that is not checked out at `commit`, a tag or a commit in full.

    Raises:
        MissingError: no such folder, or no git checkout of it.
        BadInputError: it stands at another commit, or does not know this one.
    """
    if not checkout.is_dir():
        raise MissingError(f"no such checkout: {checkout}", expected="a folder", hint="git clone it, or name its place")
    here = _git(checkout, "rev-parse", "HEAD")
    if here is None:
        raise MissingError(
            f"{checkout} is no git checkout", expected=f"one at {commit}", hint="git clone it, then record that folder"
        )
    wanted = _git(checkout, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    abbreviated = wanted is not None and wanted != commit and wanted.startswith(commit)
    if wanted != here or abbreviated:
        raise BadInputError(
            f"{checkout} is not at {commit}", expected="the tag or the whole commit that is checked out", found=here,
            hint=f"--commit {here}" if abbreviated or wanted is None else f"git -C {checkout} checkout {commit}",
        )  # fmt: skip


def _git(folder: Path, *words: str) -> str | None:
    """What git answers about a folder; None where it does not."""
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def inventory(target: str, checkout: Path, commit: str) -> dict[str, object]:
    """Names of classes, pipelines and published models -> the file that has them, as a path inside `checkout`.

    Raises:
        BadInputError: the checkout has none of the framework's classes or pipelines.
    """
    found: dict[str, dict[str, str]] = {"classes": {}, "pipelines": {}, "models": {}}
    for kind, places in PLACES[target].items():
        read = {"classes": _classes, "pipelines": _pipelines, "models": _models}[kind]
        for file in dict.fromkeys(file for place in places for file in sorted(checkout.glob(place))):
            tree = ast.parse(file.read_text("utf-8"))
            for name in read(tree, lazy=target == "diffusers"):
                found[kind].setdefault(name, file.relative_to(checkout).as_posix())
    if empty := [kind for kind in PLACES[target] if not found[kind]]:
        raise BadInputError(
            f"{checkout} has no {' and no '.join(empty)} of {target}: nothing was recorded",
            expected=f"files such as {PLACES[target][empty[0]][0]}", hint="name the root of the right checkout",
        )  # fmt: skip
    if target in _TABLES:
        found["classes"] = {**_tables(checkout, checkout / _TABLES[target]), **found["classes"]}
    return {
        "schema": INVENTORY_SCHEMA,
        "commit": commit,
        **{kind: dict(sorted(names.items())) for kind, names in found.items()},
        "files": _files(target, checkout),
    }


def _files(target: str, checkout: Path) -> dict[str, list[str]]:
    """Folder -> names of its files."""
    found: dict[str, list[str]] = {}
    for file in sorted({file for tree in TREES[target] for file in checkout.glob(tree) if file.is_file()}):
        found.setdefault(file.parent.relative_to(checkout).as_posix(), []).append(file.name)
    return found


def _laid_out(document: dict[str, object]) -> str:
    """JSON with one name, or one folder, a line: short, and readable in a diff."""
    parts = []
    for key, value in document.items():
        rows = value.items() if isinstance(value, dict) else ()
        inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(held)}" for name, held in rows)
        parts.append(
            f"{json.dumps(key)}: " + (f"{{\n{inner}\n}}" if isinstance(value, dict) and rows else json.dumps(value))
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _classes(tree: ast.Module, *, lazy: bool) -> Iterator[str]:
    """Classes that a model folder can name: those a library exports, or those that `EntryClass` lists."""
    if not lazy:
        yield from (listed := list(_entries(tree)))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in listed:
                yield from _aliases(node)
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(name.endswith(_BASES) for name in _bases(node)):
            yield node.name


def _pipelines(tree: ast.Module, *, lazy: bool) -> Iterator[str]:
    """Names that `_class_name` of a model_index.json can have."""
    if lazy:
        yield from (n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Pipeline"))
        return
    named = {node.name: _pipeline_name(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    yield from (named.get(entry) or entry for entry in _entries(tree))


def _models(tree: ast.Module, *, lazy: bool) -> Iterator[str]:
    """Repository ids that a call of `register_configs` lists."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hf_model_paths" and isinstance(node.value, ast.List):
            yield from (item.value for item in node.value.elts if isinstance(item, ast.Constant))  # type: ignore[misc]


def _entries(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "EntryClass" for t in node.targets):
            listed = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            for item in listed:
                if isinstance(item, ast.Name):
                    yield item.id
                elif isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value


def _aliases(node: ast.ClassDef) -> Iterator[str]:
    for part in node.body:
        if isinstance(part, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_aliases" for t in part.targets):
            listed = part.value.elts if isinstance(part.value, ast.List | ast.Tuple) else []
            yield from (i.value for i in listed if isinstance(i, ast.Constant) and isinstance(i.value, str))


def _pipeline_name(node: ast.ClassDef) -> str | None:
    for part in node.body:
        if isinstance(part, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "pipeline_name" for t in part.targets
        ):
            return part.value.value if isinstance(part.value, ast.Constant) else None  # type: ignore[return-value]
    return None


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases]


def _tables(checkout: Path, root: Path) -> dict[str, str]:
    """Names that `root`/registry.py lists by hand, `"Class": ("dits", "file", "Class")`, where that file exists."""
    found = {}
    for node in ast.walk(ast.parse((root / "registry.py").read_text("utf-8"))):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 3:
                bucket, module = (str(item.value) for item in value.elts[:2] if isinstance(item, ast.Constant))
                for place in (root / bucket / f"{module}.py", root / bucket / module / "__init__.py"):
                    if place.is_file():
                        found[str(key.value)] = place.relative_to(checkout).as_posix()
    return found


if __name__ == "__main__":
    main()
