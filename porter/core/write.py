"""Writing a prepared conversion: bytes move, hashed on the way, and the folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from porter.core.checkpoint import TensorInfo
from porter.core.errors import BadInputError
from porter.core.execute import execute
from porter.core.files import check_json, reading
from porter.core.hashing import SourceHashes
from porter.core.inputs import local_tensors, with_place
from porter.core.jobs import Copy, Job, Preparation, not_the_base
from porter.core.port import SCHEMA, file_sha256
from porter.core.source import Source
from porter.core.staging import Staging, stage
from porter.core.tensorplan import BASE
from porter.core.version import VERSION

Progress = Callable[[str, int], None]
_OF_BASE = "base: "


@dataclass(frozen=True)
class Result:
    """What `write` did: the manifest, files that an interrupted run had finished, what was verified."""

    manifest: dict[str, Any]
    resumed: tuple[str, ...]
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)


def write(
    ready: Preparation,
    target: Path,
    *,
    overwrite: bool,
    verify: bool,
    workers: int,
    progress: Progress,
    recheck: Callable[[], None],
) -> Result:
    """Write the folder `target`.

    Args:
        recheck: called just before the folder gets its name; raises if something stands there by now.

    Raises:
        PorterError: see `porter.core.convert.convert`.
    """
    with stage(target, ready.key, ready.bytes) as staging:
        names = _labels(ready)
        # As they are before the first byte is read: what is no longer so at the end has changed meanwhile.
        before = {path: _state(path) for path in (*names, *(copy.path for copy in ready.copies))}
        for copy in ready.copies:
            if not staging.done(copy.name):
                _copy(copy, _label(ready, copy.source, copy.name), staging, progress)
        unknown = {path: before[path] for path, (*_, label) in names.items() if not _recorded(staging, label, path)}
        hashes = SourceHashes(unknown)
        for job in ready.jobs:
            _run(job, staging, workers, hashes, progress)
        for path, state in unknown.items():
            source, name, label = names[path]
            _check_source(ready, source, name, digest := hashes.finish(path))
            staging.sources[label] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest}
        verified: dict[str, dict[str, Any]] = {}
        if verify:
            from porter.core.verify import verify_job

            for job in ready.jobs:
                verified[job.component] = verify_job(here(job), staging)
        copied = {copy.path: (copy.source, copy.name, _label(ready, copy.source, copy.name)) for copy in ready.copies}
        for path, (_, name, label) in (names | copied).items():
            _unchanged(path, name, before[path], staging.sources[label]["sha256"])
        manifest = _manifest(ready, staging)
        recheck()
        staging.publish(manifest, replace=overwrite)
        return Result(manifest, tuple(staging.resumed), verified)


def _label(ready: Preparation, source: Source, name: str) -> str:
    """What tells a file of the source and one of the base apart, which may be called alike."""
    return name if source is ready.source else _OF_BASE + name


def _labels(ready: Preparation) -> dict[Path, tuple[Source, str, str]]:
    """Every file that is read: its source, its name there, its label."""
    return {
        source.path(name): (source, name, _label(ready, source, name))
        for job in ready.jobs
        for source, name in job.sources
    }


def _recorded(staging: Staging, name: str, path: Path) -> bool:
    """Whether an interrupted run has hashed this file as it is now."""
    found, old = path.stat(), staging.sources.get(name)
    return bool(old and (old["size"], old["mtime_ns"]) == (found.st_size, found.st_mtime_ns))


def _check_source(ready: Preparation, source: Source, name: str, digest: str) -> None:
    """Whether a file that has been read is the one that its repository, or the port made from it, names."""
    declared = source.files[name].sha256
    if declared and digest != declared:
        raise BadInputError(
            f"{name} is not the file that its repository names", expected=f"sha256 {declared}", found=digest,
            hint="download it again",
        )  # fmt: skip
    original = ready.base_digests.get(name)
    if source is ready.base and original and digest != original:
        raise not_the_base(source, name, f"sha256 {original}", digest)


def _state(path: Path) -> os.stat_result:
    with reading(path):
        return path.stat()


def _unchanged(path: Path, name: str, before: os.stat_result, digest: str) -> None:
    """A source that changed while it was read makes a port of neither version.

    Times can be set back; that an inode was touched cannot be hidden, and then the content is compared.
    """
    try:
        found = path.stat()
        same = _content_stamp(found) == _content_stamp(before)
        same = same and (found.st_ctime_ns == before.st_ctime_ns or file_sha256(path) == digest)
    except OSError:
        same = False
    if not same:
        raise BadInputError(
            f"{name} changed while it was converted", expected="the file as it was at the start",
            found=f"{path} has another content, or is gone", hint="run it again when nothing writes to it",
        )  # fmt: skip


def _content_stamp(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def check_text(copy: Copy) -> None:
    """A copied file that no library could read would only be noticed when the port is loaded."""
    if copy.name.endswith(".json"):
        check_json(copy.path)


def _copy(copy: Copy, label: str, staging: Staging, progress: Progress) -> None:
    if copy.source.kind == "hub":
        check_text(copy)
    digest = staging.copy(copy.path, copy.name, label, lambda count: progress(copy.name, count))
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


def here(job: Job) -> Job:
    """The job with its tensors where they are now, by headers read again.

    What was planned from other headers, a hub's or those of a file that has changed since, is refused.
    """
    places: dict[tuple[bool, Path, str], TensorInfo] = {}
    for source, name in job.sources:
        path, borrowed = source.path(name), source is not job.sources[0][0]
        for info in local_tensors(path).values():
            places[borrowed, path, info.name] = places[borrowed, Path(name), info.name] = info  # a hub's: by its name
    found = {
        name: with_place(info, places.get((name.endswith(BASE), info.file or Path(), info.name)))
        for name, info in job.plan.sources.items()
    }
    return replace(job, plan=replace(job.plan, sources=found))


def _run(job: Job, staging: Staging, workers: int, hashes: SourceHashes, progress: Progress) -> None:
    for name, content in job.texts.items():
        if not staging.done(name):
            _write_text(staging, name, content)
    todo = [shard for shard in job.shards if not staging.done(shard.file)]
    local = here(job) if todo else job
    for shard in todo:
        written = execute(
            local.plan, staging.path(shard.file), metadata=dict(job.metadata), overwrite=True, names=shard.names,
            workers=workers, hashes=hashes, progress=lambda count, file=shard.file: progress(file, count),  # type: ignore[misc]
        )  # fmt: skip
        staging.record(shard.file, written.sha256, tensors=dict(written.tensors))
    for name, content in job.last.items():  # an index is true only when all its shards are there
        if not staging.done(name):
            _write_text(staging, name, content)


def loss_report(jobs: tuple[Job, ...]) -> dict[str, Any]:
    """What the written tensors no longer hold: dropped tensors with reasons, and rules that round or fold."""
    coverages = {job.component: job.coverage for job in jobs}
    return {
        "exact": all(job.plan.exactness == "exact" for job in jobs),
        "dropped": [{"component": name, **item} for name, c in coverages.items() for item in c["dropped"]],
        "lossy": [
            {"component": name, "sources": rule["sources"], "ops": rule["ops"], "exactness": rule["exactness"]}
            for name, c in coverages.items()
            for rule in c["rules"]
            if rule["exactness"] != "exact" and rule["targets"]
        ],
    }


def _manifest(ready: Preparation, staging: Staging) -> dict[str, Any]:
    source, base = ready.source, ready.base
    read = dict(sorted(staging.sources.items()))
    borrowed = {label.removeprefix(_OF_BASE): record for label, record in read.items() if label.startswith(_OF_BASE)}
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
            "files": {label: record for label, record in read.items() if not label.startswith(_OF_BASE)},
        },
        "base": {"spec": base.spec, "revision": base.revision, "files": borrowed} if base else None,
        "components": ready.component_records(),
        "files": dict(sorted(staging.files.items())),
        "loss": loss_report(ready.jobs),
        "not_carried": dict(ready.not_carried),
        "left_tensors": {file: list(names) for file, names in ready.left.items()},
    }
