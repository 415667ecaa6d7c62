"""One job: a port, prompts, and pictures or videos with their provenance as files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porter.core.errors import BadInputError, MissingError, UsageError
from porter.core.files import read_json
from porter.core.port import MANIFEST, Port, hostile_until_proven, is_manifest
from porter.core.version import VERSION
from runtime import outputs
from runtime.jobs import FIELDS, Ask, GenerateJob, check_text, read_image, sha256_of
from runtime.memory.exhausted import Tried, out_of_memory
from runtime.memory.options import told
from runtime.outputs import Target
from runtime.parallel import mesh
from runtime.pipeline import ComposedPipelineBase
from runtime.preview import previewing
from runtime.registry import describe, load
from runtime.request import Req
from runtime.stages.text_encoding import module_dtype

Progress = Callable[[int, int, int], None]  # (results begun before, finished steps of this one, all its steps)
_EMBEDDINGS = (
    "prompt_embeds", "prompt_masks", "pooled_embeds",
    "negative_prompt_embeds", "negative_prompt_masks", "negative_pooled_embeds",
)  # fmt: skip


@dataclass
class Evidence:
    """What is known about a port's parity: `verdict` is passed, missing, failed, stale or "no manifest"."""

    verdict: str
    manifest_sha256: str | None
    source: str | None
    warning: str | None


@dataclass(frozen=True)
class One:
    """One result: what is asked for, with which seed, and where it goes."""

    ask: Ask
    seed: int
    target: Target


def run_job(job: GenerateJob, *, progress: Progress | None = None, warn: Callable[[str], None]) -> dict[str, Any]:
    """Make the results in order, image i of an ask with seed + i, so that each can be repeated alone, bit for bit.

    Returns:
        The document `porter.generate/1`.

    Raises:
        MissingError: no such port, prompt file or picture.
        BadInputError: not a port, or its files do not fit together.
        UsageError: settings that cannot be made, or a result that is already there.
        ResourceError: out of memory, or the output cannot be written.
        CheckFailed: a step's numbers are not finite.
    """
    for ask in job.asks:
        check_text(ask.prompt)
        check_text(ask.fields.get("negative_prompt"))
    path = find_port(job.port)
    with hostile_until_proven(path):
        return _Run(job, path, warn, progress).document()


class _Run:
    """One job on its way."""

    def __init__(self, job: GenerateJob, path: Path, warn: Callable[[str], None], progress: Progress | None) -> None:
        self.job, self.path, self.progress = job, path, progress
        self.evidence = weigh(path)
        self.model = describe(path, job.options.executor)
        if job.loras and (job.options.weights or "").startswith("gguf:"):
            raise UsageError(
                "LoRAs do not run beside a GGUF file's weights", expected="--lora, or --weights gguf:FILE",
                found="both", hint="--weights fp8 takes LoRAs, and so do the stored weights",
            )  # fmt: skip
        self.warnings: list[str] = []
        self.pipeline: ComposedPipelineBase | None = None
        self._warn = warn
        self.given = {name: read_image(file) for name, file in self._files().items()}
        self.kind = outputs.format_of(job.out, job.image_format, self.model.config.task_type.video)
        self.ones = self._ones()

    def _files(self) -> dict[str, Path]:
        named = {f"image.{i}": file for i, file in enumerate(self.job.images)}
        for name, file in (("mask_image", self.job.mask), ("last_image", self.job.last_image)):
            named |= {name: file} if file is not None else {}
        return named

    def _ones(self) -> list[One]:
        """Every result with its place; requests that cannot be made are refused here, before weights are loaded."""
        job, default = self.job, self.model.sampling_params.seed
        first = default if job.seed is None else job.seed
        wanted, names = [], []
        for number, ask in enumerate(job.asks):
            seed = first if ask.seed is None else ask.seed
            self.model.validation().check_input(self._request([ask], [seed], job.num_images), self.model.config)
            stem = ask.name or (f"{number:05d}-" if len(job.asks) > 1 else "") + outputs.slug(ask.prompt)
            for i in range(job.num_images):
                wanted.append((ask, seed + i))
                alone = job.num_images == 1 and ask.name
                names.append(stem if alone else f"{stem}-seed{seed + i}")
        frames = self.model.config.task_type.video and self.kind != "mp4"
        targets = outputs.targets_of(
            job.out, names, self.kind, metadata=job.metadata, overwrite=job.overwrite, frames=frames
        )
        return [One(*each, target) for each, target in zip(wanted, targets, strict=True)]

    def _request(self, asks: list[Ask], seeds: list[int], num_images: int = 1) -> Req:
        """A new request for asks with the same fields, one result each."""
        images = [self.given[f"image.{i}"] for i in range(len(self.job.images))]
        prompts = [ask.prompt for ask in asks]
        given = {n: self.given[n] for n in ("mask_image", "last_image") if n in self.given}
        batch = Req(
            prompt=prompts[0] if len(prompts) == 1 else prompts, seed=seeds[0], num_images=num_images,
            image=images or None, extra=dict(self.job.extra), **given, **asks[0].fields,
        )  # fmt: skip
        if len(seeds) > 1:  # each result its own seed, whatever stands beside it
            batch.generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return batch

    def warn(self, line: str) -> None:
        """Say a line once."""
        if line not in self.warnings:
            self.warnings.append(line)
            self._warn(line)

    def document(self) -> dict[str, Any]:
        """Run, and say what was made."""
        if self.evidence.warning:
            self.warn(self.evidence.warning)
        self._compare_with_repeated()
        images, steps = [], list[float]()
        with out_of_memory(self._tried):
            began = time.monotonic()
            self.pipeline = pipeline = load(self.path, self.job.options)
            for file, scale in self.job.loras:
                pipeline.loras.add(file, scale=scale)
            loaded = time.monotonic()
            common = _provenance(self.path, self.evidence, pipeline, self.job) | self._given_pictures()
            kept: tuple[Any, dict[str, Any]] = (None, {})
            for begun, group in self._batches():
                batch = self._request([one.ask for one in group], [one.seed for one in group])
                if kept[0] == (batch.prompt, group[0].ask.fields):
                    for name, value in kept[1].items():
                        setattr(batch, name, value)
                self._watch(pipeline, batch, begun, group, steps)
                with previewing(pipeline, batch, [one.target for one in group], self.job.preview_every):
                    pipeline.forward(batch)
                for line in [*pipeline.warnings, *batch.warnings]:
                    self.warn(line)
                if "text_encoding" in pipeline.stages:  # the same for every picture of these prompts
                    key = (batch.prompt, group[0].ask.fields)
                    kept = (key, {name: getattr(batch, name) for name in _EMBEDDINGS})
                images += self._written(batch, group, common)
        return {
            "schema": "porter.generate/1",
            **common,
            "images": images,
            "seconds": {
                "load": round(loaded - began, 3),
                "generate": round(time.monotonic() - loaded, 3),
                "step": round(sorted(steps)[len(steps) // 2], 4) if steps else None,
            },
            "warnings": self.warnings,
        }

    def _tried(self) -> Tried:
        """What this run does already to need less memory."""
        options, pipeline = self.job.options, self.pipeline
        return Tried(
            None if pipeline is None else pipeline.running,
            self.model.executor == "native", options.offload, options.weights, options.vae_tiling,
            min(self.job.batch_size, len(self.ones)), options.dtype, options.compiled,
        )  # fmt: skip

    def _batches(self) -> Iterator[tuple[int, list[One]]]:
        """Results that are made at once: neighbours with the same fields, with how many came before."""
        begun = 0
        while begun < len(self.ones):
            group = [self.ones[begun]]
            for one in self.ones[begun + 1 : begun + self.job.batch_size]:
                if one.ask.fields != group[0].ask.fields:
                    break
                group.append(one)
            yield begun, group
            begun += len(group)

    def _watch(self, pipeline: Any, batch: Req, begun: int, group: list[One], seconds: list[float]) -> None:
        """Follow the steps: the time of each, and the progress of all results."""
        last = [0.0]

        def tap(name: str, tensors: Mapping[str, Tensor]) -> None:
            found = re.fullmatch(r"denoising\.step\.(\d+)", name)
            now = time.monotonic()
            if found and int(found[1]):  # the first step also warms up
                seconds.append(now - last[0])
            last[0] = now
            if self.progress and (found or name == "timestep_preparation"):
                self.progress(begun, int(found[1]) + 1 if found else 0, batch.num_inference_steps or 0)

        batch.taps.append(tap)

    def _written(self, batch: Req, group: list[One], common: Mapping[str, Any]) -> list[dict[str, Any]]:
        assert batch.output is not None  # the last stage verified it
        made: list[dict[str, Any]] = []
        if (run := mesh.current()) is not None and not run.main:
            return made  # every process has the same result, and the first one writes it
        for row, one in zip(batch.output, group, strict=True):
            settings = {name: getattr(batch, name) for name in FIELDS} | {"prompt": one.ask.prompt, "seed": one.seed}
            negative = settings["negative_prompt"]
            settings["negative_prompt"] = negative[0] if isinstance(negative, list) else negative
            about = {**common, **settings, "settings": _plain(batch.extra), "batch_size": len(group)}
            made.append(settings | outputs.write(one.target, row, self.kind, batch.fps, about))
        return made

    def _given_pictures(self) -> dict[str, Any]:
        """Names and hashes of the given pictures, so that a repetition can tell whether it has the same ones."""
        files = self._files()
        found = {n: {"name": files[n].name, "pixels_sha256": sha256_of(image)} for n, image in self.given.items()}
        return {"given": found} if found else {}

    def _compare_with_repeated(self) -> None:
        """Say what of a repeated result's circumstances is another here.

        Raises:
            UsageError: it was made of pictures that are not the given ones.
        """
        before = self.job.repeats
        if before is None:
            return
        had = {name: each.get("pixels_sha256") for name, each in (before.get("given") or {}).items()}
        have = {name: sha256_of(image) for name, image in self.given.items()}
        if had != have:
            odd = next(name for name in {**had, **have} if had.get(name) != have.get(name))
            named = (before.get("given") or {}).get(odd, {}).get("name", "no such picture")
            raise UsageError(
                f"the result was made of other pictures: {odd}", expected=f"{named}",
                found="another picture" if odd in have else "none", hint="name the same files with --image, --mask",
            )  # fmt: skip
        if (before.get("batch_size") or 1) > 1:
            self.warn(f"the result was made in a batch of {before['batch_size']}: alone it may differ by rounding")
        now = {"manifest_sha256": self.evidence.manifest_sha256} | _versions()
        then = {"manifest_sha256": before.get("manifest_sha256")} | (before.get("versions") or {})
        for name, value in now.items():
            if then.get(name) != value:
                self.warn(f"the result was made with another {name}: {then.get(name)}, here {value}")


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


def _versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers")
    return {"porter": VERSION} | {name: importlib.metadata.version(name) for name in names}


def _provenance(path: Path, evidence: Evidence, pipeline: Any, job: GenerateJob) -> dict[str, Any]:
    scheduler = pipeline.modules.get("scheduler")
    return {
        "port": path.resolve().name,
        "source": evidence.source,
        "manifest_sha256": evidence.manifest_sha256,
        "parity": evidence.verdict,
        "pipeline": pipeline.pipeline_name,
        "executor": pipeline.executor,
        "quality": pipeline.quality,
        "attention": pipeline.config.attention_backend,
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        "parallel": {name: size for name, size in asdict(job.options.parallel).items() if size > 1},
        "loras": pipeline.loras.provenance(None),
        "device": pipeline.device.type,
        "dtype": str(module_dtype(pipeline.denoiser)).removeprefix("torch."),
        "offload": job.options.offload,
        "weights": told(job.options.weights),
        "versions": _versions(),
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them; what it cannot hold is described."""

    def shown(value: Any) -> Any:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return f"<{type(value).__name__}>"
        return value

    return {name: shown(value) for name, value in settings.items()}
