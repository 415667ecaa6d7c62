"""`convert`: a model in one layout becomes a folder in another, whole or not at all.

`prepare` and `restore` decide everything from names and headers (so does a dry run); `write` then moves the bytes. All
directions are the same job: components with a recipe are streamed through the engine, everything else is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porter.core.errors import ResourceError, UsageError
from porter.core.jobs import Preparation, Settings
from porter.core.lanes import DEFAULT_WORKERS
from porter.core.plan import PortPlan
from porter.core.planning import make_plan
from porter.core.port import MANIFEST, Port, is_manifest
from porter.core.prepare import forward
from porter.core.restore import inverse
from porter.core.sharding import parse_size
from porter.core.source import LocalSource, Source, open_source
from porter.core.userrecipe import read_recipes
from porter.core.write import check_text, loss_report, write

if TYPE_CHECKING:
    from porter.core.recipe import Recipe

_DTYPES = ("bfloat16", "float16", "float32", "float64", "bf16", "fp16", "fp32", "fp64", "half")
Direction = Literal["diffusers", "original", "comfyui"]


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
            "base": ready.base.spec if ready.base else None,
            "not_carried": dict(ready.not_carried),
            "left_tensors": {file: {"count": len(names), "first": names[0]} for file, names in ready.left.items()},
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
    base: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Recipe] | str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    averaged: bool = False,
    workers: int = DEFAULT_WORKERS,
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
        model: hub id, folder, file or `builtin:<name>`.
        to: the layout to write: `original` and `comfyui` take a port, or a pipeline in the diffusers layout.
        component: convert only this one, into its own folder.
        base: to `diffusers`: a pipeline that gives everything which `model` lacks; to `original`: the original weights,
            for what the conversion dropped or rounded.
        config: what the tensors do not hold, in the words of the component's config.json.
        recipe: recipes that replace the catalogue's, by component, or a Python file that defines them (it is run).
        dtype: cast the converted components' floating-point tensors (`bfloat16`, `float32` …); None keeps theirs.
        shard_size: the largest a weights file may be, as `5GB`; None writes one file for each component.
        averaged: take the averaged (EMA) weights that a checkpoint holds beside the others.
        workers: threads, the copying one included; the bytes written do not depend on it.
        dry_run: account for every tensor, write nothing.
        overwrite: replace a finished port at `output`.
        verify: load the result with the real class, make every tensor again with torch and compare it, and undo the
            conversion once.
        progress: called with (file, bytes) as bytes are written.
        started: called once, before the first byte, with the sum of what `progress` will be told.

    Raises:
        PorterError: see `porter.core.errors`; after any error `output` is as it was before.
    """
    target = Path(output).expanduser().absolute()
    if workers < 1:
        raise UsageError("--workers is a number of threads", expected="1 or more", found=str(workers))
    if dtype is not None and dtype.removeprefix("torch.").lower() not in _DTYPES:
        raise UsageError(
            f"weights are not cast to {dtype!r}", expected=", ".join(_DTYPES), found=dtype, hint=f"--dtype {_DTYPES[0]}"
        )
    limit = parse_size(shard_size) if shard_size is not None else None
    if not dry_run:
        _refuse_existing(target, overwrite)
    source = open_source(model, revision=revision, token=token, offline=offline)
    other = open_source(base, token=token, offline=offline) if base is not None else None
    settings = Settings(component, config, {}, "", dtype, other, limit, averaged)
    if to == "diffusers":
        plan = make_plan(source)
        recipes, reference = _recipes(recipe, plan, component)
        ready = forward(source, plan, Settings(component, config, recipes, reference, dtype, other, limit, averaged))
    else:
        ready = _back(source, recipe, settings, to)
    if source.kind != "hub":  # a dry run downloads nothing
        for copy in ready.copies:
            check_text(copy)
    if dry_run:
        return Conversion(ready)
    if started:
        started(ready.bytes)
    written = write(
        ready, target, overwrite=overwrite, verify=verify, workers=workers, progress=progress or (lambda *_: None),
        recheck=lambda: _refuse_existing(target, overwrite),
    )  # fmt: skip
    return Conversion(ready, target, written.manifest, written.resumed, written.verified)


def _back(
    source: Source, recipe: Mapping[str, Recipe] | str | Path | None, settings: Settings, to: Direction
) -> Preparation:
    """To the original layout, or ComfyUI's: from a port by its manifest, from another pipeline by its configs."""
    if settings.averaged or settings.config is not None:
        raise UsageError(f"--ema and --config mean nothing with --to {to}", hint="leave them out")
    port = isinstance(source, LocalSource) and MANIFEST in source.files
    given: Mapping[str, Recipe] = recipe if isinstance(recipe, Mapping) else {}
    if recipe is not None and not isinstance(recipe, Mapping):
        records = Port.open(source.root).manifest["components"] if isinstance(source, LocalSource) and port else {}
        converted = [name for name, record in records.items() if record["action"] == "convert"]
        given = read_recipes(Path(recipe), settings.component or (converted[0] if len(converted) == 1 else None))
    settings = replace(settings, recipes=given)
    assert to != "diffusers"
    return inverse(source, None if port else make_plan(source), settings, to)


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
