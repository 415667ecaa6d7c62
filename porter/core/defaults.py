"""Default values of a library's class, read from its installed source with `ast`; nothing is imported.

A config that leaves a key out gets the class's default without a word, and a checkpoint trained with another value then
computes something else. So the plan compares each config with the defaults of the class that will read it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from porter.core.calls import numbers, text_calls
from porter.core.classbody import Computed, arguments, fields_of, lineage, literal_of, names, states
from porter.core.installed import class_block, file_bytes, library_root, listed_files, matching, model_files

__all__ = ["CallSource", "ClassSource", "Computed", "call_source", "class_source", "config_source", "with_kept_modules"]

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


# A class's head, or the type that it states.
_TYPE_ROWS = re.compile(rb'^class (\w+)|^    model_type(?:: [\w\[\]]+)? = "([\w.-]+)"', re.MULTILINE)


@dataclass(frozen=True)
class ClassSource:
    """What a class's source says.

    Attributes:
        file: path inside the library, with the line of the class.
        defaults: parameter -> default value; a `Computed` where it is no literal.
        required: parameters without a default.
        keep_in_fp32: names of modules that the library keeps in float32 whatever dtype it is asked for.
        keep_from_float16: those that it keeps in float32 only where it is asked for float16.
    """

    file: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    keep_in_fp32: tuple[str, ...] = ()
    keep_from_float16: tuple[str, ...] = ()

    def knows(self, key: str) -> bool:
        """Whether the class takes a parameter of this name."""
        return key in self.defaults or key in self.required


@dataclass(frozen=True)
class CallSource(ClassSource):
    """What a pipeline's source says of its `__call__`: `defaults` and `required` are of that.

    Attributes:
        batches_guidance: whether both passes of classifier-free guidance go through the denoiser in one forward.
        frame_timesteps: whether the denoiser is given a timestep for each latent frame (diffusion forcing).
        upcasts_decoder: whether an autoencoder whose config says `force_upcast` is computed in float32 after float16.
        sizes: what its constructor sets as default sizes: `height` and `width` in pixels, `sample_size` in latents.
        numbers: what else its text says where nobody says otherwise (`porter.core.calls.numbers`).
        text_calls: how it asks its text encoders (`porter.core.calls.text_calls`).
    """

    batches_guidance: bool = False
    frame_timesteps: bool = False
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
    near = (file for folder in folders for file in matching(str(folder), "*.py"))
    rest = (file for place in places for file in matching(str(place), "*/*.py"))  # only looked for where needed
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
        defaults, required = arguments(function)
        return CallSource(
            f"{root.name}/{file.relative_to(root)}:{found[0]}", defaults, tuple(required),
            batches_guidance=_BATCHED.search(found[1]) is not None,
            frame_timesteps=b"enable_diffusion_forcing=True" in found[1], upcasts_decoder=b"force_upcast" in found[1],
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
    for file in chain(listed, _files(root, library)):
        if wanted in (text := file_bytes(file)) and class_block(text, class_name):
            return _read(root, file, class_name)
    return None


@cache
def config_source(model_type: str) -> ClassSource | None:
    """The transformers config class of a `model_type`; None where there is none."""
    root = library_root("transformers")
    if root is None or not re.fullmatch(r"[\w-]{1,80}", model_type):
        return None
    file = next(
        (near for near in model_files(root, model_type, "configuration_*.py") if model_type in _types(near)), None
    )
    file = file or _every_type(root).get(model_type)
    return _read(root, file, _types(file)[model_type]) if file else None


def with_kept_modules(source: ClassSource, class_name: str, model_type: str) -> ClassSource:
    """A transformers config's source with the float32-keep modules of the model class.

    transformers heeds `_keep_in_fp32_modules` for float16 only, and `…_strict` for bfloat16 too
    (its `PreTrainedModel`); a class without them has those of its bases in the same file.
    """
    loosely, strictly = _kept_modules(class_name, model_type)
    return replace(source, keep_in_fp32=strictly, keep_from_float16=loosely)


@cache
def _kept_modules(class_name: str, model_type: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    root = library_root("transformers")
    if root is None or not class_name.isidentifier() or not re.fullmatch(r"[\w-]{1,80}", model_type):
        return (), ()
    for file in model_files(root, model_type, "modeling_*.py"):
        text = file_bytes(file)
        if class_block(text, class_name) is None:
            continue
        if b"_keep_in_fp32_modules" not in text:
            return (), ()
        kept: dict[str, tuple[str, ...]] = {}
        for each in lineage(text, class_name):
            for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
                if states(each, name):
                    kept[name] = names(literal_of(each, name))
        return kept.get("_keep_in_fp32_modules", ()), kept.get("_keep_in_fp32_modules_strict", ())
    return (), ()


@cache
def _types(file: Path) -> Mapping[str, str]:
    """model_type -> class, of a configuration file."""
    found: dict[str, str] = {}
    head = ""
    for row in _TYPE_ROWS.finditer(file_bytes(file)):
        head = row[1].decode() if row[1] else head
        if row[2] and head:
            found.setdefault(row[2].decode(), head)
    return found


@cache
def _every_type(root: Path) -> Mapping[str, Path]:
    found: dict[str, Path] = {}
    for file in _files(root, "transformers"):
        for model_type in _types(file):
            found.setdefault(model_type, file)
    return found


def _files(root: Path, library: str) -> Iterator[Path]:
    for place in _PLACES.get(library, ()):
        yield from matching(str(root), place)


def _read(root: Path, file: Path, class_name: str) -> ClassSource:
    text = file_bytes(file)
    defaults: dict[str, Any] = {}
    required: list[str] = []
    keep: tuple[str, ...] = ()
    for each in lineage(text, class_name):
        defaults |= fields_of(each)
        for part in each.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                own, needed = arguments(part)
                defaults |= own
                required += needed
        if states(each, "_keep_in_fp32_modules"):
            keep = names(literal_of(each, "_keep_in_fp32_modules"))
    place = class_block(text, class_name)
    line = place[0] if place else 0
    return ClassSource(f"{root.name}/{file.relative_to(root)}:{line}", defaults, tuple(required), keep)
