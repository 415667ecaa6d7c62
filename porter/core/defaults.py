"""Default values of a library's class, read from its installed source with `ast`; nothing is imported.

A config that leaves a key out gets the class's default without a word, and a checkpoint trained with another value then
computes something else. So the plan compares each config with the defaults of the class that will read it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from porter.core.calls import numbers, text_calls

# Tables of lazy imports, which name the file of a class.
_LISTS: Mapping[str, tuple[str, ...]] = {"diffusers": ("models", "schedulers")}
# What a pipeline does to its latents where it computes both passes of classifier-free guidance in one forward.
_BATCHED = re.compile(rb"torch\.cat\(\[(?:\w*latents\w*|intermediate_images)\] \* 2|latents\w*\.repeat\(2\b")
_SIZES = re.compile(rb"^        self\.default_(height|width|sample_size) = (\d{1,6})$", re.MULTILINE)
# Where classes of a library stand, in the order of likelihood; only class names that occur there are ever parsed.
_PLACES: Mapping[str, tuple[str, ...]] = {
    "diffusers": (
        "models/transformers/*.py", "models/autoencoders/*.py", "models/unets/*.py", "schedulers/*.py",
        "models/controlnets/*.py", "models/*.py", "pipelines/*/*.py", "guiders/*.py",
    ),
    "transformers": ("models/*/configuration_*.py",),
}  # fmt: skip


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


@dataclass(frozen=True)
class ClassSource:
    """What a class's source says.

    Attributes:
        file: path inside the library, with the line of the class.
        defaults: parameter -> default value; a `Computed` where it is no literal.
        required: parameters without a default.
        keep_in_fp32: patterns of modules that the library keeps in float32 (`_keep_in_fp32_modules`).
    """

    file: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    keep_in_fp32: tuple[str, ...] = ()

    def knows(self, key: str) -> bool:
        """Whether the class takes a parameter of this name."""
        return key in self.defaults or key in self.required


@dataclass(frozen=True)
class CallSource(ClassSource):
    """What a pipeline's source says of its `__call__`: `defaults` and `required` are of that.

    Attributes:
        batches_guidance: whether both passes of classifier-free guidance go through the denoiser in one forward.
        upcasts_decoder: whether an autoencoder whose config says `force_upcast` is computed in float32 after float16.
        sizes: what its constructor sets as default sizes: `height` and `width` in pixels, `sample_size` in latents.
        numbers: what else its text says where nobody says otherwise (`porter.core.calls.numbers`).
        text_calls: how it asks its text encoders (`porter.core.calls.text_calls`).
    """

    batches_guidance: bool = False
    upcasts_decoder: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    text_calls: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)


@cache
def call_source(pipeline_class: str) -> CallSource | None:
    """How diffusers' `pipeline_class` is called; None where it is not installed or has no `__call__` of its own."""
    root = library_root("diffusers")
    if root is None or not pipeline_class.isidentifier():
        return None
    if f'"{pipeline_class}"'.encode() not in file_bytes(root / "pipelines" / "__init__.py"):
        return None
    places = (root / "pipelines", root / "pipelines" / "deprecated")
    folders = [file.with_suffix("") for place in places for file in listed_files(place, pipeline_class)]
    near = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    rest = (file for place in places for file in sorted(place.glob("*/*.py")))  # only looked for where it is needed
    for file in chain(near, rest):
        found = class_block(file_bytes(file), pipeline_class)
        signature = found and re.search(rb"^    def __call__\(.*?^    \)", found[1], re.MULTILINE | re.DOTALL)
        if not found or not signature:
            continue
        try:
            function = ast.parse(signature[0].strip() + b": pass").body[0]
        except SyntaxError:
            return None
        if not isinstance(function, ast.FunctionDef):
            return None
        defaults, required = _arguments(function)
        return CallSource(
            f"{root.name}/{file.relative_to(root)}:{found[0]}", defaults, tuple(required),
            batches_guidance=_BATCHED.search(found[1]) is not None, upcasts_decoder=b"force_upcast" in found[1],
            sizes={name.decode(): int(size) for name, size in _SIZES.findall(found[1])},
            numbers=numbers(found[1]), text_calls=text_calls(found[1]),
        )  # fmt: skip
    return None


@cache
def class_source(library: str, class_name: str) -> ClassSource | None:
    """The source of `library`'s class `class_name`; None where it is not installed or has no such class."""
    root = library_root(library)
    if root is None or not class_name.isidentifier():
        return None
    wanted = f"class {class_name}".encode()
    listed = [file for place in _LISTS.get(library, ()) for file in listed_files(root / place, class_name)]
    for file in dict.fromkeys([*listed, *_files(root, library)]):
        if wanted in (text := file_bytes(file)) and class_block(text, class_name):
            return _read(root, file, class_name)
    return None


@cache
def config_source(model_type: str) -> ClassSource | None:
    """The transformers config class of a `model_type`; None where there is none."""
    root = library_root("transformers")
    if root is None or not re.fullmatch(r"[\w-]+", model_type):
        return None
    wanted = re.compile(rb'^    model_type(?:: [\w\[\]]+)? = "' + model_type.encode() + rb'"', re.MULTILINE)
    plain = model_type.replace("-", "_")
    # A text model's type begins with its folder's name: `clip_text_model` stands in `clip`.
    near = [
        f for i in range(len(plain), 1, -1) for f in sorted((root / "models" / plain[:i]).glob("configuration_*.py"))
    ]
    for file in dict.fromkeys([*near, *_files(root, "transformers")]):
        text = file_bytes(file)
        if found := wanted.search(text):
            heads = re.findall(rb"^class (\w+)", text[: found.start()], re.MULTILINE)
            return _read(root, file, heads[-1].decode()) if heads else None
    return None


def library_root(library: str) -> Path | None:
    """The folder of an installed library, or None; it is not imported."""
    spec = find_spec(library) if library.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def listed_files(place: Path, class_name: str) -> list[Path]:
    """The file that a library's table of lazy imports names for a class."""
    text = file_bytes(place / "__init__.py")
    rows = re.finditer(rb'_import_structure\["([\w.]+)"\]([^_]*(?:_(?!import_structure)[^_]*)*)', text)
    inside = [row[1].decode() for row in rows if f'"{class_name}"'.encode() in row[2]]
    return [place / (name.replace(".", "/") + ".py") for name in inside]


def _files(root: Path, library: str) -> Iterator[Path]:
    for place in _PLACES.get(library, ()):
        yield from sorted(root.glob(place))


def class_block(text: bytes, class_name: str) -> tuple[int, bytes] | None:
    """(line, source) of a top-level class, cut out so that its file need not be parsed.

    It ends where the next function, class or decorator begins: strings in it may have lines at the left margin.
    """
    end = rb"(?=^(?:class|def|async def) \w|^@\w|\Z)"
    found = re.search(rb"^class " + class_name.encode() + rb"\b.*?" + end, text, re.MULTILINE | re.DOTALL)
    return (text.count(b"\n", 0, found.start()) + 1, found[0]) if found else None


def file_bytes(file: Path) -> bytes:
    """A file's content; empty where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _read(root: Path, file: Path, class_name: str) -> ClassSource:
    text = file_bytes(file)
    lineage = _lineage(text, class_name)
    defaults: dict[str, Any] = {}
    required: list[str] = []
    keep: tuple[str, ...] = ()
    for each in lineage:
        defaults |= _fields(each)
        for part in each.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                own, needed = _arguments(part)
                defaults |= own
                required += needed
        found = _literal_of(each, "_keep_in_fp32_modules")
        keep = tuple(found) if isinstance(found, list | tuple | set) else keep
    place = class_block(text, class_name)
    line = place[0] if place else 0
    return ClassSource(f"{root.name}/{file.relative_to(root)}:{line}", defaults, tuple(required), keep)


def _lineage(text: bytes, class_name: str) -> list[ast.ClassDef]:
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


def _fields(node: ast.ClassDef) -> dict[str, Any]:
    """Annotated class attributes with values: the fields of a dataclass."""
    return {
        part.target.id: _value(part.value)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value is not None
    }


def _arguments(function: ast.FunctionDef) -> tuple[dict[str, Any], list[str]]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)][1:]
    values: list[ast.expr | None] = [None] * (len(names) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(names, values, strict=True)] + [
        (argument.arg, value) for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return (
        {name: _value(value) for name, value in pairs if value is not None},
        [name for name, value in pairs if value is None],
    )


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        text = ast.unparse(node)
        return _INFINITE.get(text.replace('"', "'"), Computed(text))


def _literal_of(node: ast.ClassDef, name: str) -> Any:
    for part in node.body:
        targets = (
            part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets) and part.value is not None:  # type: ignore[attr-defined]
            found = _value(part.value)  # type: ignore[attr-defined]
            return None if isinstance(found, Computed) else found
    return None
