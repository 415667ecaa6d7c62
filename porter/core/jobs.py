"""What a conversion consists of, decided before a byte is read: jobs for the recipes, files to copy, what is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porter.core.errors import UsageError
from porter.core.recipe import Recipe, TensorPlan
from porter.core.source import Source

# The file in which each library looks for a component's weights.
_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def weights_name(library: str) -> str:
    """What a component's weights are called, in one file, by the library that reads them."""
    return _WEIGHTS.get(library, _WEIGHTS["diffusers"])


@dataclass(frozen=True)
class Copy:
    """A file that goes over unchanged, under its own name. `sha256`: what it must be, where someone has said so."""

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
        return cls(name, info.size, info.sha256)


@dataclass(frozen=True)
class Job:
    """One component through its recipe: compiled plan, files it reads, file it writes, small files beside it."""

    component: str
    library: str
    class_name: str
    recipe: Recipe
    reference: str
    plan: TensorPlan
    config: Mapping[str, Any]
    sources: tuple[str, ...]
    target: str
    metadata: Mapping[str, str]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    source_metadata: Mapping[str, str] = field(default_factory=dict)
    source_dtypes: Any = None
    dtype: str | None = None

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
            "sources": list(self.sources),
            "recipe": {"name": self.recipe.name, "reference": self.reference, "digest": self.plan.digest},
            "dtype": self.dtype,
            "config": dict(self.config),
            "source_metadata": dict(self.source_metadata),
            "source_dtypes": self.source_dtypes,
            "coverage": self.coverage,
        }

    def to_json(self) -> dict[str, Any]:
        """The component's entry in `porter convert --json`."""
        return {
            "name": self.component,
            "class": self.class_name,
            "recipe": {"name": self.recipe.name, "reference": self.reference, "digest": self.plan.digest},
            "sources": list(self.sources),
            "target": self.target,
            "exactness": self.plan.exactness,
            "bytes_in": self.plan.bytes_in,
            "bytes_out": self.plan.bytes_out,
            "peak_buffer": self.plan.peak_buffer,
            "coverage": self.coverage,
        }


@dataclass(frozen=True)
class Preparation:
    """A whole conversion, decided."""

    source: Source
    direction: str
    family: str | None
    pipeline_class: str | None
    jobs: tuple[Job, ...]
    copies: tuple[Copy, ...]
    copied_components: Mapping[str, dict[str, Any]]
    not_carried: tuple[tuple[str, str], ...]
    licence: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes that will be written."""
        return sum(job.plan.bytes_out for job in self.jobs) + sum(copy.size for copy in self.copies)

    @property
    def key(self) -> str:
        """Equal for equal settings on equal sources; a killed run with this key can be continued."""

        def stamp(name: str) -> tuple[str, int, int]:
            found = self.source.path(name).stat()
            return name, found.st_size, found.st_mtime_ns

        document = {
            "direction": self.direction,
            "source": [self.source.spec, self.source.revision],
            "jobs": [
                [job.component, job.plan.digest, job.dtype, dict(job.config), job.target, dict(job.metadata)]
                + [stamp(name) for name in job.sources]
                for job in self.jobs
            ],
            "copies": [stamp(copy.name) for copy in self.copies],
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
