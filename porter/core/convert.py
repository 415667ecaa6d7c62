"""`convert`: a model in one layout becomes a folder in another, whole or not at all.

`prepare` decides everything from names and headers (so does a dry run); `write` then moves the bytes. Both directions
are the same job: components with a recipe are streamed through the engine, everything else is copied.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porter.core.checkpoint import read_header
from porter.core.errors import BadInputError, CheckpointError, ResourceError, UsageError
from porter.core.files import check_json
from porter.core.jobs import Copy, Job, Preparation
from porter.core.plan import PortPlan
from porter.core.planning import make_plan
from porter.core.port import MANIFEST, SCHEMA, file_record, file_sha256, is_manifest
from porter.core.prepare import forward
from porter.core.restore import inverse
from porter.core.source import Source, open_source
from porter.core.staging import Staging, stage
from porter.core.userrecipe import read_recipes
from porter.core.version import VERSION

if TYPE_CHECKING:
    from porter.core.recipe import Recipe

Direction = Literal["diffusers", "original"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """What was done, or what a dry run would do.

    Attributes:
        output: the finished folder; None after a dry run.
        manifest: its manifest; None after a dry run.
        resumed: files that an interrupted run had already finished.
        verified: what `--verify` compared, component by component.
    """

    preparation: Preparation
    output: Path | None = None
    manifest: dict[str, Any] | None = None
    resumed: tuple[str, ...] = ()
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `porter convert --json`."""
        ready = self.preparation
        return {
            "schema": "porter.convert/1",
            "source": ready.source.spec,
            "direction": ready.direction,
            "dry_run": self.output is None,
            "output": str(self.output) if self.output else None,
            "components": [job.to_json() for job in ready.jobs],
            "copied": [copy.name for copy in ready.copies],
            "not_carried": dict(ready.not_carried),
            "loss": loss_report(ready.jobs),
            "bytes": ready.bytes,
            "resumed": list(self.resumed),
            "verified": self.verified,
        }


def convert(
    model: str | Path,
    output: str | Path,
    *,
    to: Direction = "diffusers",
    component: str | None = None,
    config: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Recipe] | str | Path | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
    progress: Callable[[str, int], None] | None = None,
    started: Callable[[int], None] | None = None,
) -> Conversion:
    """Converts `model` into the folder `output`.

    Args:
        model: hub id, folder, file or `builtin:<name>`; for `to="original"` a port folder.
        to: the layout to write.
        component: convert only this one, into its own folder.
        config: what the tensors do not hold, in the words of the component's config.json.
        recipe: recipes that replace the catalogue's, by component, or a Python file that defines them (it is run).
        dtype: cast the converted components' floating-point tensors (`bfloat16`, `float32` …); None keeps theirs.
        dry_run: account for every tensor, write nothing.
        overwrite: replace a finished port at `output`.
        verify: load the result with the real class, compare every tensor, and undo the conversion once.
        progress: called with (file, bytes) as bytes are read for hashing and as they are written.
        started: called once, before the first byte, with the sum of what `progress` will be told.

    Raises:
        PorterError: see `porter.core.errors`; after any error `output` is as it was before.
    """
    target = Path(output).expanduser().absolute()
    if not dry_run:
        _refuse_existing(target, overwrite)
    source = open_source(model, revision=revision, token=token, offline=offline)
    if to == "original":
        recipes = recipe if isinstance(recipe, Mapping) else read_recipes(Path(recipe), component) if recipe else {}
        ready = inverse(source, component=component, recipes=recipes, dtype=dtype)
    else:
        plan = make_plan(source)
        recipes, reference = _recipes(recipe, plan, component)
        ready = forward(
            source, plan, component=component, config=config, recipes=recipes, reference=reference, dtype=dtype
        )
    if source.kind != "hub":  # a dry run downloads nothing
        for copy in ready.copies:
            _check_text(source, copy)
    if dry_run:
        return Conversion(ready)
    if started:
        started(ready.bytes + sum(source.files[name].size for job in ready.jobs for name in job.sources))
    return _write(ready, target, overwrite=overwrite, verify=verify, progress=progress or (lambda *_: None))


def _recipes(
    given: Mapping[str, Recipe] | str | Path | None, plan: PortPlan, component: str | None
) -> tuple[Mapping[str, Recipe], str]:
    """The user's own recipes by component, and how a manifest names where they came from."""
    if given is None or isinstance(given, Mapping):
        return given or {}, "given in memory"
    names = [part.name for part in plan.components if part.status == "convert"]
    only = names[0] if len(names) == 1 else None
    return read_recipes(Path(given), component or only), str(Path(given).expanduser().absolute())


def _refuse_existing(target: Path, overwrite: bool) -> None:
    """An existing output is an error, unless it is a port and the user wants it replaced."""
    try:
        exists = target.exists() or target.is_symlink()
        empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ResourceError(f"cannot write {target}", found=str(error), hint="choose another -o") from error
    if not exists or empty:
        return
    if not overwrite:
        raise UsageError(
            f"the output exists: {target}", hint="choose another -o, or add --overwrite to replace a finished port"
        )
    if not is_manifest(target / MANIFEST):
        raise UsageError(
            f"{target} is no port: --overwrite replaces only what `porter convert` wrote",
            expected=f"a {MANIFEST} in it",
            hint="choose another -o, or remove it yourself",
        )


def _write(
    ready: Preparation, target: Path, *, overwrite: bool, verify: bool, progress: Callable[[str, int], None]
) -> Conversion:
    with stage(target, ready.key, ready.bytes) as staging:
        _hash_sources(ready, staging, progress)
        for copy in ready.copies:
            if not staging.done(copy.name):
                _copy(ready.source, copy, staging, progress)
        for job in ready.jobs:
            for name, content in job.texts.items():
                if not staging.done(name):
                    _write_text(staging, name, content)
            if not staging.done(job.target):
                _run(here(ready.source, job), staging, progress)
        verified: dict[str, dict[str, Any]] = {}
        if verify:
            from porter.core.verify import verify_job

            for job in ready.jobs:
                verified[job.component] = verify_job(here(ready.source, job), staging)
        _sources_unchanged(ready, staging)
        manifest = _manifest(ready, staging)
        _refuse_existing(target, overwrite)  # again: it may have appeared meanwhile
        staging.publish(manifest, replace=overwrite)
        return Conversion(ready, target, manifest, tuple(staging.resumed), verified)


def _hash_sources(ready: Preparation, staging: Staging, progress: Callable[[str, int], None]) -> None:
    """sha256 of every original file that a recipe reads; kept from an interrupted run where size and time agree."""
    for name in dict.fromkeys(name for job in ready.jobs for name in job.sources):
        path = ready.source.path(name)
        found, old = path.stat(), staging.sources.get(name)
        if old and (old["size"], old["mtime_ns"]) == (found.st_size, found.st_mtime_ns):
            continue
        digest = file_sha256(path, lambda count, name=name: progress(name, count))  # type: ignore[misc]
        declared = ready.source.files[name].sha256
        if declared and digest != declared:
            raise BadInputError(
                f"{name} is not the file that its repository names", expected=f"sha256 {declared}", found=digest,
                hint="download it again",
            )  # fmt: skip
        staging.sources[name] = file_record(path, digest)


def _sources_unchanged(ready: Preparation, staging: Staging) -> None:
    """A source that changed while it was read makes a port of neither version."""
    for name, record in staging.sources.items():
        found = ready.source.path(name).stat()
        if (found.st_size, found.st_mtime_ns) != (record["size"], record["mtime_ns"]):
            raise BadInputError(f"{name} changed while it was converted", hint="run it again when nothing writes to it")


def _check_text(source: Source, copy: Copy) -> None:
    """A copied file that no library could read would only be noticed when the port is loaded."""
    if copy.name.endswith(".json"):
        check_json(source.path(copy.name))


def _copy(source: Source, copy: Copy, staging: Staging, progress: Callable[[str, int], None]) -> None:
    if source.kind == "hub":
        _check_text(source, copy)
    digest = staging.copy(source.path(copy.name), copy.name, lambda count: progress(copy.name, count))
    if copy.sha256 and digest != copy.sha256:
        raise BadInputError(
            f"{copy.name} is not what its manifest or repository says", expected=copy.sha256, found=digest,
            hint="download or convert it again",
        )  # fmt: skip


def _write_text(staging: Staging, name: str, content: bytes) -> None:
    with staging.path(name).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staging.record(name, hashlib.sha256(content).hexdigest())


def here(source: Source, job: Job) -> Job:
    """The job with its tensors in files on this machine; what was planned from remote headers must be in them."""
    if all(info.file is not None and info.file.is_absolute() for info in job.plan.sources.values()):
        return job
    local = {name: info for file in job.sources for name, info in read_header(source.path(file))[0].items()}
    for name, info in job.plan.sources.items():
        found = local.get(name)
        if found is None or (found.dtype, found.shape, found.begin) != (info.dtype, info.shape, info.begin):
            raise CheckpointError(f"{name} is not in the downloaded file as its header said", hint="run it again")
    return replace(job, plan=replace(job.plan, sources={name: local[name] for name in job.plan.sources}))


def _run(job: Job, staging: Staging, progress: Callable[[str, int], None]) -> None:
    from porter.core.execute import execute

    written = execute(
        job.plan,
        staging.path(job.target),
        metadata=dict(job.metadata),
        progress=lambda count: progress(job.target, count),
        overwrite=True,
    )
    staging.record(job.target, written.sha256, tensors=dict(written.tensors))


def loss_report(jobs: tuple[Job, ...]) -> dict[str, Any]:
    """What the written tensors no longer hold: dropped tensors with reasons, and rules that round."""
    coverages = {job.component: job.coverage for job in jobs}
    return {
        "exact": all(job.plan.exactness == "exact" for job in jobs),
        "dropped": [{"component": name, **item} for name, c in coverages.items() for item in c["dropped"]],
        "lossy": [
            {"component": name, "sources": rule["sources"], "ops": rule["ops"], "exactness": rule["exactness"]}
            for name, c in coverages.items()
            for rule in c["rules"]
            if rule["exactness"] == "lossy"
        ],
    }


def _manifest(ready: Preparation, staging: Staging) -> dict[str, Any]:
    source = ready.source
    return {
        "schema": SCHEMA,
        "porter": VERSION,
        "status": "complete",
        "direction": ready.direction,
        "family": ready.family,
        "pipeline": ready.pipeline_class,
        "licence": ready.licence,
        "source": {
            "spec": source.spec,
            "kind": source.kind,
            "revision": source.revision,
            "files": dict(sorted(staging.sources.items())),
        },
        "components": ready.component_records(),
        "files": dict(sorted(staging.files.items())),
        "loss": loss_report(ready.jobs),
        "not_carried": dict(ready.not_carried),
    }
