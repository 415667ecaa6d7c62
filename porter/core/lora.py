"""LoRA files: which weights they change and by which factors, whatever their writer called them.

    y = W x + scale · B (A x)        A: (rank, inputs), B: (outputs, rank), scale: alpha / rank

Headers and alphas are read here, strictly and without torch. Every tensor is part of a factor, or the file is refused
by the tensor's name. Which module a factor belongs to is told in `loratargets`.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from porter.core.checkpoint import TensorInfo, floating, read_bytes, read_header
from porter.core.errors import BadInputError, CheckpointError, MissingError
from porter.core.files import open_regular
from porter.core.lorakeys import KINDS, PEFT, Place, places, role
from porter.core.lorasettings import METADATA, Settings, beside, embedded
from porter.core.units import several

LARGEST = 1000.0  # a scale beyond this is a mistake: trained ones lie between 0.01 and 10
_LONGEST = 400  # characters of a tensor's name
_PARTS = {"a": "lora_A (down)", "b": "lora_B (up)"}
_NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "I16": "<h", "I32": "<i", "I64": "<q", "U8": "<B"}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
_EXPORT = "download or export the file again"


@dataclass(frozen=True)
class Factor:
    """The change of one weight. `stem` is what its keys have in common; `alpha` is None where the file has none."""

    stem: str
    a: TensorInfo
    b: TensorInfo
    alpha: float | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def places(self) -> tuple[Place, ...]:
        """How the stem can be read, the likeliest first."""
        return places(self.stem)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: every tensor of the file is in one of `factors`. `notes`: what was taken for granted."""

    path: Path
    factors: tuple[Factor, ...]
    notes: tuple[str, ...] = ()


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA's header, alphas and settings; a folder is read where it holds one safetensors file.

    Raises:
        MissingError: no such file.
        CheckpointError: not a safetensors file, or a damaged one.
        BadInputError: a tensor that is no factor of a LoRA, factors that do not fit together, an alpha that is none.
    """
    file = _file(Path(path))
    header, metadata = read_header(file)
    roles = _roles(file, header)
    given = {stem: _scalar(found["alpha"]) for stem, found in roles.items() if "alpha" in found}
    if given and (bare := sorted(roles.keys() - given.keys())):
        raise BadInputError(
            f"{file}: {bare[0]} has no alpha, while others have", expected="an alpha for each factor, or for none",
            found=f"{several(len(given), 'alpha')}, {len(bare)} missing", hint=_EXPORT,
        )  # fmt: skip
    settings = _settings(file, metadata, roles)
    factors = tuple(_factor(file, stem, found, given.get(stem), settings) for stem, found in roles.items())
    notes = []
    if not given and not settings:
        notes.append(f"{file.name} says no alpha: the rank is taken, a scale of 1")
    return LoraFile(file, factors, tuple(notes))


def _file(path: Path) -> Path:
    """The safetensors file at `path`; a pickle is refused, whatever it is called."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise BadInputError(
                f"{path} is no LoRA", expected="one .safetensors file in it",
                found=", ".join(file.name for file in files) or "none", hint="name the file",
            )  # fmt: skip
        return files[0]
    try:
        with open_regular(path) as stream:
            head = stream.read(4)
    except OSError as error:
        raise MissingError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    if head.startswith(_PICKLES):
        raise CheckpointError(
            f"{path} is a pickle, which is a program", expected="a .safetensors file", found="torch.save's format",
            hint="save its tensors with safetensors, where you trust the file",
        )  # fmt: skip
    return path


def _roles(file: Path, header: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Stem → the tensors under it: `a`, `b`, `alpha`.

    Raises:
        BadInputError: a tensor is none of these, stands there twice, or lacks its partner.
    """
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    odd: list[str] = []
    sets: set[str] = set()
    for name, info in header.items():
        part, stem, adapter = role(name) if len(name) <= _LONGEST else ("", "", None)
        if not part:
            odd.append(name)
            continue
        sets |= {adapter} if adapter else set()
        if part in found[stem]:
            raise BadInputError(
                f"{file}: {name} and {found[stem][part].name} change the same weight", expected="one of them",
                found=f"adapters {', '.join(sorted(sets))}" if len(sets) > 1 else "two names for one factor",
                hint=_EXPORT,
            )  # fmt: skip
        found[stem][part] = info
    if odd:
        raise _not_factors(file, odd, len(header))
    if not found:
        raise BadInputError(f"{file} holds no tensors", expected="factors of a LoRA", hint=_EXPORT)
    for stem, parts in found.items():
        if absent := _PARTS.keys() - parts.keys():
            words = " and ".join(_PARTS[part] for part in sorted(absent))
            raise BadInputError(
                f"{file}: {stem} has no {words}", expected="both factors of each changed weight",
                found=", ".join(info.name for info in parts.values()), hint=_EXPORT,
            )  # fmt: skip
    return dict(found)


def _not_factors(file: Path, odd: list[str], count: int) -> BadInputError:
    short = [name for name in odd if len(name) <= _LONGEST]
    kinds = {words: [name for name in short if re.search(end, name)] for words, end in KINDS.items()}
    words, names = next(((words, names) for words, names in kinds.items() if names), ("", short or odd))
    names = [name[:_LONGEST] for name in names]
    what = f"{file}: {names[0]} is no factor of a LoRA" + (f" but of {words}" if words else "")
    return BadInputError(
        what, expected="lora_A and lora_B, or lora_down and lora_up, with alpha, and nothing else",
        found=f"{several(len(names), 'such tensor')} of {count}: {', '.join(names[:4])}",
        hint="merge it into its model with the tool that trained it, or export it as a plain LoRA",
    )  # fmt: skip


def _settings(file: Path, metadata: Mapping[str, str], roles: Iterable[str]) -> dict[str | None, Settings]:
    """What a PEFT config says of the factors, by component; None: of all."""
    if METADATA in metadata:
        return embedded(file, metadata[METADATA])
    if file.name == "adapter_model.safetensors" or any(stem.startswith(PEFT) for stem in roles):
        return beside(file)
    return {}


def _factor(
    file: Path, stem: str, found: Mapping[str, TensorInfo], alpha: float | None, settings: Mapping[str | None, Settings]
) -> Factor:
    """One changed weight, its factors checked against each other."""
    a, b = found["a"], found["b"]
    for info in (a, b):
        if not floating(info.dtype):
            raise BadInputError(
                f"{file}: {info.name} holds no weights",
                expected="floating-point numbers",
                found=info.dtype,
                hint=_EXPORT,
            )
        if len(info.shape) not in (2, 4, 5) or not all(info.shape):
            raise BadInputError(
                f"{file}: {info.name} is no factor", expected="a matrix or a convolution's kernel, of rank 1 or more",
                found=f"shape {list(info.shape)}", hint=_EXPORT,
            )  # fmt: skip
    if a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
        raise BadInputError(
            f"{file}: {a.name} and {b.name} have different ranks",
            expected=f"{b.name} of shape [outputs, {a.shape[0]}]", found=f"{list(a.shape)} and {list(b.shape)}",
            hint=_EXPORT,
        )  # fmt: skip
    said = next((each.scale(file, place.module, a.shape[0]) for place in places(stem)
                 if (each := settings.get(place.component) or settings.get(None))), None)  # fmt: skip
    scale = said if alpha is None else alpha / a.shape[0]
    if alpha is not None and said is not None and said != scale:
        raise BadInputError(
            f"{file}: {stem}.alpha contradicts the file's settings", expected=f"a scale of {said:g}",
            found=f"alpha {alpha:g}, a scale of {scale:g}", hint=_EXPORT,
        )  # fmt: skip
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale) or not 0 < scale <= LARGEST:
        shown = f"alpha {alpha:g} at rank {a.shape[0]}" if alpha is not None else f"a scale of {scale:g}"
        raise BadInputError(
            f"{file}: {stem} has an absurd alpha", expected=f"a scale (alpha / rank) above 0, up to {LARGEST:g}",
            found=shown, hint=_EXPORT,
        )  # fmt: skip
    return Factor(stem, a, b, alpha, scale)


def _scalar(info: TensorInfo) -> float:
    """The one number that a tensor holds."""
    if info.numel != 1 or (info.dtype not in _NUMBERS and info.dtype != "BF16"):
        raise BadInputError(
            f"{info.file}: {info.name} is no alpha", expected="one number", found=f"{info.dtype} {list(info.shape)}",
            hint=_EXPORT,
        )  # fmt: skip
    data = read_bytes(info)
    if info.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_NUMBERS[info.dtype], data)[0])
