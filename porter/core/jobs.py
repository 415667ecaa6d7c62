"""What a conversion consists of, decided before a byte is read: jobs for the recipes, files to copy, what is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porter.core.architectures import shapes_of
from porter.core.errors import BadInputError, UsageError
from porter.core.files import reading
from porter.core.recipe import Recipe, TensorPlan
from porter.core.sharding import Shard
from porter.core.source import Source
from porter.core.version import VERSION

WEIGHTS_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


@dataclass(frozen=True)
class Settings:
    """What a user asked of a conversion; see `porter.core.convert.convert` for the words."""

    component: str | None = None
    config: Mapping[str, Any] | None = None
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    reference: str = ""
    dtype: str | None = None
    base: Source | None = None
    shard_size: int | None = None
    averaged: bool = False


@dataclass(frozen=True)
class Copy:
    """A file that goes over unchanged, under its own name. `sha256`: what it must be, where someone has said so."""

    source: Source
    name: str
    size: int
    sha256: str | None = None

    @classmethod
    def of(cls, source: Source, name: str) -> Copy:
        """File `name` of a source; its content must be at hand, not a pointer to it.

        Raises:
            MissingError: no such file, or only a Git-LFS pointer.
        """
        info = source.content(name)
        return cls(source, name, info.size, info.sha256)

    @property
    def path(self) -> Path:
        """The file itself."""
        return self.source.path(self.name)


@dataclass(frozen=True)
class Job:
    """One component through its recipe: compiled plan, files it reads, files it writes, small files beside them.

    Attributes:
        sources: files that are read, each with the source it belongs to.
        shards: files that are written.
        texts: small files that are written first; `last` those that are written last (an index over the shards).
        prefix: what stands before its tensors' names in a file that holds several components.
        assumed: config keys that nobody gave and no tensor shows.
        averaged: whether the tensors are the averaged (EMA) copies.
    """

    component: str
    library: str
    class_name: str
    recipe: Recipe
    reference: str
    plan: TensorPlan
    config: Mapping[str, Any]
    sources: tuple[tuple[Source, str], ...]
    shards: tuple[Shard, ...]
    metadata: Mapping[str, str]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    last: Mapping[str, bytes] = field(default_factory=dict)
    source_metadata: Mapping[str, str] = field(default_factory=dict)
    source_dtypes: Any = None
    dtype: str | None = None
    prefix: str = ""
    assumed: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the source files."""
        return tuple(name for _, name in self.sources)

    @property
    def coverage(self) -> dict[str, Any]:
        """The engine's account of every tensor, as JSON."""
        return self.plan.coverage.to_json()

    def record(self) -> dict[str, Any]:
        """The component's entry in the manifest."""
        return {
            "library": self.library,
            "class": self.class_name,
            "action": "convert",
            "sources": list(self.files),
            "prefix": self.prefix,
            "weights": [shard.file for shard in self.shards],
            "recipe": {"name": self.recipe.name, "reference": self.reference, "digest": self.plan.digest},
            "dtype": self.dtype,
            "averaged": self.averaged,
            "config": dict(self.config),
            "assumed": dict(self.assumed),
            "source_metadata": dict(self.source_metadata),
            "source_dtypes": self.source_dtypes,
            # A recipe that does not know its sources' tensors could not be read backwards without these.
            "source_shapes": None if self.recipe.knows_sources else shapes_of(self.plan.sources),
            "targets_checked": self.recipe.knows_targets,
            "coverage": self.coverage,
        }

    def to_json(self) -> dict[str, Any]:
        """The component's entry in `porter convert --json`."""
        return {
            "name": self.component,
            "class": self.class_name,
            "recipe": {"name": self.recipe.name, "reference": self.reference, "digest": self.plan.digest},
            "sources": list(self.files),
            "targets": [shard.file for shard in self.shards],
            "exactness": self.plan.exactness,
            "bytes_in": self.plan.bytes_in,
            "bytes_out": self.plan.bytes_out,
            "peak_buffer": self.plan.peak_buffer,
            "assumed": dict(self.assumed),
            "targets_checked": self.recipe.knows_targets,
            "coverage": self.coverage,
        }


@dataclass(frozen=True)
class Preparation:
    """A whole conversion, decided.

    Attributes:
        not_carried: (file, why) of every file that does not go over.
        left: file → tensors in it that no recipe takes.
        base_digests: sha256 that files of the base must have, by their names.
    """

    source: Source
    direction: str
    family: str | None
    pipeline_class: str | None
    jobs: tuple[Job, ...]
    copies: tuple[Copy, ...]
    copied_components: Mapping[str, dict[str, Any]]
    not_carried: tuple[tuple[str, str], ...]
    licence: Mapping[str, Any]
    left: Mapping[str, list[str]] = field(default_factory=dict)
    base: Source | None = None
    base_digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes that will be written."""
        return sum(job.plan.bytes_out for job in self.jobs) + sum(copy.size for copy in self.copies)

    @property
    def key(self) -> str:
        """Equal for equal settings on equal sources; a killed run with this key can be continued."""

        def stamp(source: Source, name: str) -> tuple[str | int, ...]:
            path = source.path(name)
            with reading(path):
                found = path.stat()
            # Archives and build tools give many files one time: another file of this name has another inode.
            return source.spec, name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

        document = {
            "porter": VERSION,
            "direction": self.direction,
            "source": [self.source.spec, self.source.revision],
            "jobs": [
                {
                    "job": [job.component, job.plan.digest, job.dtype, job.averaged, dict(job.metadata), job.prefix],
                    "texts": {name: hashlib.sha256(text).hexdigest() for name, text in job.texts.items()},
                    "config": dict(job.config),
                    "shards": [[shard.file, shard.names] for shard in job.shards],
                    "sources": [stamp(*item) for item in job.sources],
                    "places": [[name, info.begin] for name, info in job.plan.sources.items()],
                }
                for job in self.jobs
            ],
            "copies": [stamp(copy.source, copy.name) for copy in self.copies],
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def component_records(self) -> dict[str, dict[str, Any]]:
        """The manifest's components, by name."""
        found = {**self.copied_components, **{job.component: job.record() for job in self.jobs}}
        return dict(sorted(found.items()))


def unknown_component(source: Source, component: str | None, names: list[str]) -> UsageError:
    """The error for a component that a model does not have."""
    return UsageError(
        f"unknown component {component!r}", expected=" | ".join(names) or "none", hint=f"porter plan {source.given}"
    )


def not_the_base(base: Source, name: str, expected: str, found: str) -> BadInputError:
    """The error for a base that is another model's, or another version of this one's."""
    return BadInputError(
        f"{name} of the base {base.given} is not the file that the port was made from", expected=expected, found=found,
        hint="name the original file or folder with --base",
    )  # fmt: skip
