"""What the installed diffusers and transformers say of their classes, read from their source text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from porter.core.installed import (
    class_block,
    file_bytes,
    library_root,
    listed_files,
    listing,
    matching,
    model_files,
)  # fmt: skip

LIBRARIES = ("diffusers", "transformers")
_PLAIN_TYPES = (
    "Union", "Optional", "None", "bool", "int", "float", "str", "list", "dict", "List", "Dict", "Any", "Tuple",
)  # fmt: skip


@cache
def library_has(library: str, class_name: str) -> bool | None:
    """Whether the installed `library` defines `class_name`, from its source text and without importing it.

    None where the library is not installed.
    """
    root = library_root(library) if library in LIBRARIES else None
    if root is None:
        return None
    if re.search(rb"[\"']" + re.escape(class_name).encode() + rb"[\"']", file_bytes(root / "__init__.py")):
        return True
    # transformers renamed its feature extractors of images, and reads files that name the old class with the new one.
    names = {class_name, class_name.removesuffix("Fast"), class_name.replace("FeatureExtractor", "ImageProcessor")}
    pattern = re.compile(rb"[\"'(](" + "|".join(map(re.escape, names)).encode() + rb")[\"']")
    if pattern.search(_automatic(library)):
        return True
    # A class outside the automatic tables: the folder that its name begins with (`CLIPTextModelWithProjection` → clip).
    lowered = class_name.lower()
    models = str(root / "models")
    folders = (f"{models}/{name}" for name in listing(models)[1] if lowered.startswith(name.replace("_", "")))
    definition = re.compile(rb"^class (" + "|".join(map(re.escape, names)).encode() + rb")\b", re.MULTILINE)
    return any(definition.search(file_bytes(file)) for folder in folders for file in matching(folder, "*.py"))


@cache
def _automatic(library: str) -> bytes:
    """The automatic tables of a library: which class reads which model type."""
    root = library_root(library)
    files = matching(str(root / "models" / "auto"), "*.py") if root else ()
    return b"\n".join(file_bytes(file) for file in files)


@cache
def pipeline_module(module: str) -> bool:
    """Whether `diffusers.pipelines` has a module of this name."""
    root = library_root("diffusers")
    if root is None or not module.isidentifier():
        return False
    return any((root / "pipelines" / place / module).is_dir() for place in ("", "deprecated"))


@cache
def pipeline_module_has(module: str, class_name: str) -> bool:
    """Whether `diffusers.pipelines.<module>` defines `class_name`, or hands on transformers' class of that name.

    A model_index.json may name such a module where a library's name stands (`["stable_diffusion", …SafetyChecker]`).
    """
    root = library_root("diffusers")
    if root is None or not module.isidentifier() or not class_name.isidentifier():
        return False
    places = (f"{root}/pipelines/{module}", f"{root}/pipelines/deprecated/{module}")
    if any(class_block(file_bytes(file), class_name) for place in places for file in matching(place, "*.py")):
        return True
    return any(class_name in _from_transformers(file) for place in places for file in matching(place, "__init__.py"))


def _from_transformers(file: Path) -> set[str]:
    """Names that a file imports from transformers."""
    imports = (node for node in ast.walk(ast.parse(file_bytes(file))) if isinstance(node, ast.ImportFrom))
    found = (node for node in imports if not node.level and (node.module or "").partition(".")[0] == "transformers")
    return {name.asname or name.name for node in found for name in node.names}


@cache
def pipeline_components(class_name: str) -> Mapping[str, tuple[str, ...]] | None:
    """Role -> class names that a diffusers pipeline's constructor asks for; None where diffusers has none such."""
    source = _pipeline_source(class_name)
    return _roles(source) if source is not None else None


@cache
def pipeline_generates(class_name: str) -> str | None:
    """The component of a diffusers pipeline that emits tokens one by one (`self.<component>.generate(…)`).

    Empty where none does; None where diffusers has no such pipeline.
    """
    source = _pipeline_source(class_name)
    if source is None:
        return None
    found = re.search(rb"\bself\.(\w+)\.generate\(", source)
    return found[1].decode() if found else ""


@cache
def pipeline_optional(class_name: str) -> frozenset[str]:
    """Roles that a diffusers pipeline runs without (`_optional_components`)."""
    stated = re.search(rb"^    _optional_components\b[^=\n]*= *(\[[^\]]*\])", _pipeline_source(class_name) or b"", re.M)
    try:
        names = ast.literal_eval(stated[1].decode()) if stated else []
    except (ValueError, SyntaxError):
        return frozenset()
    return frozenset(name for name in names if isinstance(name, str))


@cache
def _pipeline_source(class_name: str) -> bytes | None:
    root = library_root("diffusers")
    if root is None or not class_name.isidentifier():
        return None
    for package in listed_files(root / "pipelines", class_name):
        for file in matching(str(package.with_suffix("")), "*.py"):
            if block := class_block(file_bytes(file), class_name):
                return block[1]
    return None


def _roles(block: bytes) -> Mapping[str, tuple[str, ...]]:
    """The constructor's arguments whose annotation names classes."""
    head = block[: (block.find(b"super().__init__") + 1) or None]
    found: dict[str, tuple[str, ...]] = {}
    try:
        tree = ast.parse(head.rsplit(b"\n", 1)[0] + b"\n        pass\n" if head is not block else head)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for argument in (*node.args.args[1:], *node.args.kwonlyargs):
                names = _class_names(argument.annotation)
                if names:
                    found[argument.arg] = names
            break
    return found


def _class_names(annotation: ast.expr | None) -> tuple[str, ...]:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return ()
    if annotation is None:
        return ()
    words = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    words += [node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)]
    return tuple(dict.fromkeys(word for word in words if word not in _PLAIN_TYPES and word[:1].isupper()))


@cache
def tied_weights(class_name: str, model_type: str) -> Mapping[str, str]:
    """Tensor name -> the tensor it is tied to, as a transformers class declares it (`_tied_weights_keys`)."""
    root = library_root("transformers")
    if root is None or not re.fullmatch(r"\w{1,100}", class_name) or not re.fullmatch(r"[\w-]{1,80}", model_type):
        return {}
    for file in model_files(root, model_type, "modeling_*.py"):
        block = class_block(file_bytes(file), class_name)
        if block is None:
            continue
        stated = re.search(rb"\b_tied_weights_keys\b[^=\n]*=\s*(\{[^}]*\})", block[1])
        try:
            table = ast.literal_eval(stated[1].decode()) if stated else {}
        except (ValueError, SyntaxError):
            return {}
        return {str(name): str(kept) for name, kept in table.items()} if isinstance(table, dict) else {}
    return {}
