"""One job: a port, a prompt, and pictures with their provenance as files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porter.core.atomic import replace_bytes
from porter.core.errors import BadInputError, MissingError, ResourceError, UsageError
from porter.core.files import read_json
from porter.core.port import MANIFEST, Port, hostile_until_proven, is_manifest
from porter.core.version import VERSION
from runtime.image import png_bytes, to_pil
from runtime.registry import describe, load
from runtime.request import Req
from runtime.stages import InputValidationStage

Progress = Callable[[int, int, int], None]  # (image, finished steps, all steps)
SETTINGS = (
    "prompt",
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
)


@dataclass(frozen=True)
class GenerateJob:
    """What `porter generate` was asked for; None is unset. `fields` are those of `Req`, without seed and prompt."""

    port: str
    prompt: str
    seed: int | None = None
    num_images: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    device: str | None = None
    out: Path | None = None
    overwrite: bool = False
    metadata: bool = True


@dataclass
class Evidence:
    """What is known about a port's parity: `verdict` is passed, missing, failed, stale or "no manifest"."""

    verdict: str
    manifest_sha256: str | None
    source: str | None
    warning: str | None


def run_job(job: GenerateJob, *, progress: Progress | None = None, warn: Callable[[str], None]) -> dict[str, Any]:
    """Make the pictures one by one, image i with seed + i, so that each can be repeated alone, bit for bit.

    Returns:
        The document `porter.generate/1`.

    Raises:
        MissingError: no such port.
        BadInputError: not a port, or its files do not fit together.
        UsageError: settings that cannot be made, or a picture that is already there.
        ResourceError: out of memory, or the output cannot be written.
        CheckFailed: the result is not finite.
    """
    for text in (job.prompt, job.fields.get("negative_prompt")):
        if text and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError("the prompt is not UTF-8", found=ascii(text), hint="type it again in a UTF-8 terminal")
    path = find_port(job.port)
    with hostile_until_proven(path):
        return _run(job, path, warn, progress)


def _run(job: GenerateJob, path: Path, warn: Callable[[str], None], progress: Progress | None) -> dict[str, Any]:
    evidence = weigh(path)
    model = describe(path)
    seed = model.sampling_params.seed if job.seed is None else job.seed
    whole = Req(prompt=job.prompt, seed=seed, num_images=job.num_images, **job.fields)
    InputValidationStage(model.sampling_params).check_input(whole, model.config)  # before gigabytes are loaded
    targets = _targets(job, [seed + i for i in range(job.num_images)])
    warnings = [evidence.warning] if evidence.warning else []
    for line in warnings:
        warn(line)
    with out_of_memory():
        began = time.monotonic()
        pipeline = load(path, dtype=job.dtype, device=job.device)
        loaded = time.monotonic()
        common = _provenance(path, evidence, pipeline)
        embeddings: dict[str, Any] = {}
        images = []
        for i, target in enumerate(targets):
            batch = Req(prompt=job.prompt, seed=seed + i, **job.fields, **embeddings)
            if progress:
                batch.taps.append(_steps(progress, i, batch))
            pipeline.forward(batch)
            for line in [*pipeline.warnings, *batch.warnings]:
                if line not in warnings:
                    warnings.append(line)
                    warn(line)
            embeddings = {name: getattr(batch, name) for name in _EMBEDDINGS}  # the same for every image
            settings = {name: getattr(batch, name) for name in SETTINGS}
            images.append(_write(batch, target, common | settings, job))
    return {
        "schema": "porter.generate/1",
        **common,
        "images": images,
        "seconds": {"load": round(loaded - began, 3), "generate": round(time.monotonic() - loaded, 3)},
        "warnings": warnings,
    }


MAX_NAME = 200  # bytes; file systems take 255, and a temporary name is longer
_EMBEDDINGS = ("prompt_embeds", "pooled_embeds", "negative_prompt_embeds", "negative_pooled_embeds")


def find_port(name: str) -> Path:
    """The folder that `name` is.

    Raises:
        MissingError, BadInputError: with the command that makes a port of what `name` is instead.
    """
    path = Path(name)
    short = re.sub(r"[^\w.-]+", "-", name.rpartition(":")[2].rpartition("/")[2].removesuffix(".safetensors")) or "model"
    convert = f"porter convert {shlex.quote(name)} -o {short}-port"
    if path.is_dir():
        return path
    if path.is_file():
        raise BadInputError(f"{name} is a file, not a port folder", hint=convert)
    if name.startswith("builtin:"):
        raise BadInputError(f"{name} is a model to port, not yet a port", hint=convert)
    raise MissingError(f"no such port: {name}", expected="a folder that `porter convert` wrote", hint=convert)


def weigh(path: Path) -> Evidence:
    """The port's parity, from its manifest and parity.json."""
    quoted = shlex.quote(str(path))
    if (path / MANIFEST).is_file():
        read_json(path / MANIFEST)  # refuses one that nobody can read; another tool's is none of ours
    if not is_manifest(path / MANIFEST):
        line = f"{path} has no {MANIFEST}: not written by `porter convert`, nothing is known about its parity"
        return Evidence("no manifest", None, None, line)
    port = Port.open(path)
    verdict, source = port.verdict(), port.manifest["source"].get("spec")
    if verdict == "passed":
        return Evidence(verdict, port.manifest_sha256, source, None)
    says = {
        "missing": "this port was never compared with its reference",
        "failed": "this port DIFFERS from its reference",
        "stale": "this port, or the code that runs it, changed after it was compared with its reference",
    }[verdict]
    return Evidence(verdict, port.manifest_sha256, source, f"parity {verdict}: {says}; run: porter parity {quoted}")


def _provenance(path: Path, evidence: Evidence, pipeline: Any) -> dict[str, Any]:
    names = ("torch", "diffusers", "transformers")
    parameter = next(pipeline.modules["transformer"].parameters())
    return {
        "port": path.resolve().name,
        "source": evidence.source,
        "manifest_sha256": evidence.manifest_sha256,
        "parity": evidence.verdict,
        "pipeline": pipeline.pipeline_name,
        "executor": "native",
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {"porter": VERSION} | {name: importlib.metadata.version(name) for name in names},
    }


def _steps(progress: Progress, image: int, batch: Req) -> Callable[[str, Mapping[str, Tensor]], None]:
    def tap(name: str, tensors: Mapping[str, Tensor]) -> None:
        found = re.fullmatch(r"denoising\.step\.(\d+)", name)
        if found or name == "timestep_preparation":
            progress(image, int(found[1]) + 1 if found else 0, batch.num_inference_steps or 0)

    return tap


def _targets(job: GenerateJob, seeds: list[int]) -> list[Path]:
    """Where each picture goes. Refused: what is there already, and what cannot be written."""
    out = job.out if job.out is not None else Path("images")
    if out.suffix.lower() == ".png":
        if len(seeds) > 1:
            raise UsageError(
                f"{len(seeds)} pictures do not fit into one file",
                expected="a folder",
                found=str(out),
                hint=f"-o {shlex.quote(str(out.with_suffix('')))}",
            )
        targets = [out]
    else:
        slug = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower())[:48].strip("-") or "image"
        targets = [out / f"{slug}-seed{seed}.png" for seed in seeds]
    if max(len(os.fsencode(target.name)) for target in targets) > MAX_NAME:
        raise UsageError(f"the name is too long: {targets[0].name[:40]}…", hint="a shorter name with -o")
    files = [f for target in targets for f in ((target, target.with_suffix(".json")) if job.metadata else (target,))]
    if not job.overwrite and (there := [f for f in files if f.exists()]):
        raise UsageError(
            f"{there[0]} is already there" + (f", and {len(there) - 1} more" if len(there) > 1 else ""),
            hint="--overwrite to replace, or another folder with -o",
        )
    folder = targets[0].parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or any(f.is_dir() for f in files):
        raise ResourceError(
            f"pictures cannot be written to {targets[0].parent}",
            found=f"{folder} is {'not writable' if folder.is_dir() else 'not a folder'}",
            hint="name another folder with -o",
        )
    return targets


def _write(batch: Req, target: Path, about: dict[str, Any], job: GenerateJob) -> dict[str, Any]:
    """Write one picture and its sidecar; each appears complete or not at all."""
    assert batch.output is not None
    (image,) = to_pil(batch.output)
    about = about | {"pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    document = {"schema": "porter.image/1", **about}
    data = png_bytes(image, document if job.metadata else None)
    sidecar = target.with_suffix(".json") if job.metadata else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if sidecar:
            document |= {"file": target.name, "file_sha256": hashlib.sha256(data).hexdigest()}
            replace_bytes(sidecar, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
        replace_bytes(target, data)
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written", found=error.strerror or str(error), hint="name another folder with -o"
        ) from error
    settings = {name: about[name] for name in SETTINGS}
    return {"file": str(target), "sidecar": str(sidecar) if sidecar else None, **settings} | {
        "pixels_sha256": about["pixels_sha256"],
        "file_sha256": hashlib.sha256(data).hexdigest(),
    }


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Running out of memory, on either device, as our error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError):
            known = isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text
            if not known:
                raise
        raise ResourceError(
            "out of memory",
            found=text.splitlines()[0] if text else None,
            hint="smaller --height and --width, --dtype bfloat16, or another --device",
        ) from error
