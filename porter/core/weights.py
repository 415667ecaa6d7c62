"""Weight files: which names are one set (a file, or its shards), and what their headers say together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from porter.core.checkpoint import TensorInfo, stays_inside
from porter.core.errors import BadInputError, CheckpointError

if TYPE_CHECKING:
    from porter.core.source import Source

CHECKPOINTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (*CHECKPOINTS, ".msgpack", ".onnx", ".onnx_data", ".h5", ".xml", ".tflite", ".engine", ".npz")
# The names under which diffusers and transformers save a component; only these may carry any variant word.
STANDARD = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIX = "|".join(suffix[1:] for suffix in CHECKPOINTS)
_SHARD = re.compile(
    rf"(?P<stem>.+?)-(?P<number>\d{{1,5}})-of-(?P<of>\d{{1,5}})(?:\.(?P<late>\w+))?\.(?P<kind>{_SUFFIX})"
)
_WHOLE = re.compile(rf"(?P<stem>.+?)\.(?P<kind>{_SUFFIX})")
_VARIANT = re.compile(rf"({'|'.join(STANDARD)})\.(\w+)")
_ONE_FILE = -1
MAX_TENSORS = 200_000  # of one source; the largest pipelines have some thousands
MAX_LOST = 50  # missing shards that are named
# Files with a checkpoint's suffix that hold no model: other runtimes' data, and what training leaves behind.
_NO_MODEL = re.compile(r"(openvino|onnx|optimizer|scheduler|training_args|random_states|rng_state|scaler)[\w.-]*$")
_INDEX = re.compile(r"(?P<stem>.+?)\.(?P<kind>safetensors|bin)\.index(?:\.(?P<late>\w+))?\.json")


@dataclass(frozen=True)
class WeightSet:
    """One component's weights in one format and precision.

    Attributes:
        stem: its path without shard number, variant and suffix.
        kind: the suffix without its dot.
        variant: `fp16` and the like; empty for the plain set.
        files: every file of it, in shard order.
        missing: numbers of the first 50 shards that the names promise and that are not here.
        index: the JSON file that says which tensor lies in which shard.
    """

    stem: str
    kind: str
    variant: str
    files: tuple[str, ...]
    missing: tuple[int, ...] = ()
    index: str | None = None

    @property
    def standard(self) -> bool:
        """Whether it is called as diffusers and transformers save a component."""
        return PurePosixPath(self.stem).name in STANDARD

    @property
    def folder(self) -> str:
        """The folder it lies in; empty for the source's own."""
        return self.stem.rpartition("/")[0]


def weight_sets(names: Iterable[str], folder: str | None = None) -> list[WeightSet]:
    """The sets among `names` that lie in `folder` ("" is the root; None: anywhere), the best one of each stem first.

    A whole file goes before shards of the same weights, safetensors before pickles, the plain set before variants.
    """
    groups: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    promised: Counter[tuple[str, str, str]] = Counter()
    indexes: dict[tuple[str, str, str], str] = {}
    for name in names:
        parent, slash, base = name.rpartition("/")
        if folder is not None and parent != folder:
            continue
        match = _INDEX.fullmatch(base) or _SHARD.fullmatch(base) or _WHOLE.fullmatch(base)
        if match is None or _NO_MODEL.match(base):
            continue
        stem, kind, late = match["stem"], match["kind"], match.groupdict().get("late")
        varied = _VARIANT.fullmatch(stem)
        stem, variant = (varied[1], varied[2]) if varied else (stem, late or "")
        key = (f"{parent}{slash}{stem}", kind, variant)
        if match.re is _INDEX:
            indexes[key] = name
        elif match.re is _SHARD:
            groups[key][int(match["number"])] = name
            promised[key] = max(promised[key], int(match["of"]))
        else:
            groups[key][_ONE_FILE] = name
    found = []
    for key, numbered in groups.items():
        if _ONE_FILE in numbered:
            found.append(WeightSet(*key, (numbered[_ONE_FILE],)))
            continue
        first = 0 if 0 in numbered else 1  # some count from zero
        absent = (number for number in range(first, first + promised[key]) if number not in numbered)
        lost = tuple(islice(absent, MAX_LOST))
        found.append(WeightSet(*key, tuple(numbered[n] for n in sorted(numbered)), lost, indexes.get(key)))
    return sorted(found, key=_preference)


def _preference(one: WeightSet) -> tuple[Any, ...]:
    safe = one.kind in ("safetensors", "sft")
    return (one.folder, not one.standard, not safe, one.variant != "", one.variant, one.stem, one.kind)


@dataclass(frozen=True)
class Read:
    """What the headers of one set say.

    Attributes:
        header: its tensors; None where no header can be had (Git-LFS pointers).
        metadata: what the files say of themselves.
    """

    header: dict[str, TensorInfo] | None
    metadata: dict[str, str] = field(default_factory=dict)


def read_set(source: Source, one: WeightSet) -> Read:
    """The tensors of a set, merged over its shards and held against its index.

    Raises:
        CheckpointError: a header breaks its format, a tensor stands in two shards, or the index says otherwise.
        BadInputError: the index is no index, or names a file outside its folder; more tensors than any model has.
    """
    places = read_index(source, one.index) if one.index else None
    if any(source.files[name].lfs_pointer for name in one.files):
        return Read(None)
    header: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in one.files:
        tensors, said = source.header(name)
        source.tensors += len(tensors)
        if source.tensors > MAX_TENSORS:
            raise BadInputError(
                f"{source.given} holds more tensors than any model", expected=f"at most {MAX_TENSORS} in all its files",
                found=f"{source.tensors} up to {name}", hint="name one checkpoint of it",
            )  # fmt: skip
        if twice := next((key for key in tensors if key in header), None):
            raise CheckpointError(
                f"{name}: tensor {twice!r} stands in another shard too", expected="each tensor once",
                found=", ".join(one.files[:3]), hint="download the shards again",
            )  # fmt: skip
        header |= tensors
        metadata |= said
        for key in tensors if places is not None else ():
            stated = places.get(key, "no shard")  # type: ignore[union-attr]
            if stated != name:
                raise CheckpointError(
                    f"{one.index}: tensor {key!r} lies in {name}", expected=f"the index to name {name}",
                    found=stated, hint="download index and shards again",
                )  # fmt: skip
    if places is not None and not one.missing and (lost := next((key for key in places if key not in header), None)):
        raise CheckpointError(
            f"{one.index}: tensor {lost!r} is in no shard", expected=f"it in {places[lost]}",
            hint="download index and shards again",
        )  # fmt: skip
    return Read(header, metadata)


def indexed(source: Source, folder: str, sets: list[WeightSet]) -> list[WeightSet]:
    """`sets` of a component's folder, with the files that a standard index names instead of those of the names alone.

    Raises:
        BadInputError: the index is no index, or names a file outside its folder.
    """
    for stem in (f"{folder}/{name}" if folder else name for name in STANDARD):
        for kind in ("safetensors", "bin"):
            name = f"{stem}.{kind}.index.json"
            if name not in source.files or any(one.stem == stem and one.kind == kind for one in sets):
                continue
            files = sorted(set(read_index(source, name).values()))
            here = tuple(file for file in files if file in source.files)
            if here:
                lost = tuple(number for number, file in enumerate(files, 1) if file not in source.files)[:MAX_LOST]
                left = [one for one in sets if not set(one.files) & set(here)]
                return [WeightSet(stem, kind, "", here, lost, name), *left]
    return sets


def is_index(name: str) -> bool:
    """Whether a file is called as an index of shards is."""
    return _INDEX.fullmatch(name.rpartition("/")[2]) is not None


def read_index(source: Source, name: str) -> dict[str, str]:
    """Tensor name -> path of its shard inside the source.

    Raises:
        BadInputError: no table from tensors to files, or a file outside the index's own folder.
    """
    document = source.json(name)
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise BadInputError(
            f"{name} is no index of shards", expected='"weight_map": {tensor: file}', found=repr(table)[:80],
            hint="repair or download it again",
        )  # fmt: skip
    folder = name.rpartition("/")[0]
    for shard in set(table.values()):
        if not stays_inside(shard):
            raise BadInputError(
                f"{name} names a shard outside its folder", expected="a file beside the index", found=repr(shard)[:120],
                hint="do not trust this repository; download it again from its author",
            )  # fmt: skip
    return {tensor: f"{folder}/{shard}" if folder else shard for tensor, shard in table.items()}


def totals(tensors: Iterable[TensorInfo]) -> tuple[int, dict[str, int]]:
    """(parameters, bytes per dtype) of some tensors."""
    sizes: Counter[str] = Counter()
    count = 0
    for info in tensors:
        sizes[info.dtype] += info.end - info.begin
        count += info.numel
    return count, dict(sizes.most_common())


def shared_tensors(header: Mapping[str, TensorInfo], metadata: Mapping[str, str], tied: Mapping[str, str]) -> list[str]:
    """Tensors that stand for another one as well: `lm_head.weight = model.embed_tokens.weight`.

    Args:
        metadata: a file's own notes; safetensors' `save_model` writes the names it left out there.
        tied: names that the class ties (`porter.core.libraries.tied_weights`).
    """
    found = [f"{name} = {kept}" for name, kept in metadata.items() if kept in header and name not in header]
    for name, kept in tied.items():
        here = [key for key in header if key == kept or key.endswith("." + kept) or kept.endswith("." + key)]
        if here and not any(key == name or key.endswith("." + name) for key in header):
            found.append(f"{name} = {here[0]}")
        elif here and name in header:
            found.append(f"{name} and {here[0]}: tied by the class, stored twice")
    return list(dict.fromkeys(found))
