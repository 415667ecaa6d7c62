"""The executor `diffusers`: any pipeline that diffusers can run, between the same stages, with the same metadata.

Which settings a request may bring is read off the signature of the pipeline's own call; nothing that was asked for is
left out without a word. The arithmetic is diffusers' own, in every bit.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porter.core.errors import BadInputError, UsageError
from runtime import callarguments, callresult
from runtime.attention import attention_backend
from runtime.backends import TORCH_BACKENDS
from runtime.calls import (
    NAMES,
    CallConfig,
    CallParams,
    as_declared,
    describe_call,
    described,
    fits,
    pipeline_class,
    required,
)
from runtime.config import PipelineConfig
from runtime.loader import load_components, quiet_libraries, read_index
from runtime.pipeline import ComposedPipelineBase
from runtime.request import Req
from runtime.stages import InputValidationStage, PipelineStage, VerificationResult
from runtime.stages.denoising import Finite

_DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
_AUTOENCODERS = ("vae", "movq", "vqvae", "vqgan", "video_vae")


class CallValidationStage(InputValidationStage):
    """The standard checks, and that the call has a name and a use for all that is asked."""

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = super().verify_input(batch, config)
        assert isinstance(config, CallConfig)
        if config.name_of(config.cfg_field) is None:  # its guidance has another name, or none
            result.failures = [each for each in result.failures if each[0] != config.cfg_field]
        reported = {field for field, _, _ in result.failures} | ({"fps"} if config.task_type.video else set())
        for name in NAMES:
            value = getattr(batch, name)
            empty = name == "prompt" and not "".join(batch.prompts)
            if value is not None and config.name_of(name) is None and not empty and name not in reported:
                result.add_check(name, value, False, f"nothing: {config.name} does not take it")
        for name, value in batch.extra.items():
            if name in self.sampling_params.extra:
                parameter = config.call[name]
                result.add_check(name, value, fits(parameter, value), described(parameter))
        if batch.sigmas is not None and "sigmas" in batch.extra:
            result.add_check("sigmas", batch.sigmas, False, "said once")
        mask = config.call.get("mask_image")
        if mask is not None and required(mask) and batch.mask_image is None:
            result.add_check("mask_image", None, False, "a picture")
        for name in self.sampling_params.extra:
            if required(config.call[name]) and name not in batch.extra:
                result.add_check(name, None, False, f"--set {name}=…: {described(config.call[name])}")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        assert isinstance(config, CallConfig)
        scale = getattr(batch, config.cfg_field)
        scale = getattr(self.sampling_params, config.cfg_field) if scale is None else scale
        if batch.negative_prompt is not None and scale is not None and scale <= 1:
            batch.warn(
                f"most pipelines heed a negative prompt only where {config.cfg_field} is above 1; it is {scale:g}"
            )
        self.sampling_params.fill(batch)
        if batch.generator is None:
            assert batch.seed is not None  # filled above
            batch.generator = [torch.Generator("cpu").manual_seed(batch.seed + i) for i in range(batch.batch_size)]
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        return VerificationResult()


class DiffusersStage(PipelineStage):
    """Runs the whole of a diffusers pipeline; its steps are shown to the taps."""

    given_name = "denoising"

    def __init__(self, pipe: Any, config: CallConfig) -> None:
        self.pipe, self.call, self.title = pipe, config.call, config.name

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        assert isinstance(config, CallConfig) and batch.generator is not None  # by the validation
        self._prepare_autoencoder(config)
        outputs = []
        with attention_backend(config.attention_backend, TORCH_BACKENDS), _heard(batch):
            for part in callarguments.parts(batch, config):
                outputs.append(self._run(part, batch, config))
        batch.output = torch.cat(outputs)
        self._note_sizes(batch, config)
        batch.tap(self.name, image=batch.output)
        return batch

    def _prepare_autoencoder(self, config: CallConfig) -> None:
        for asked, name in ((config.vae_tiling, "tiling"), (config.vae_slicing, "slicing")):
            found = [self.pipe.components[n] for n in _AUTOENCODERS if self.pipe.components.get(n) is not None]
            switches = [s for each in found if (s := getattr(each, f"enable_{name}", None)) is not None]
            if asked and not switches:
                raise UsageError(
                    f"the autoencoder of {self.title} has no {name}", expected="one that has",
                    found=", ".join(type(each).__name__ for each in found) or "none", hint=f"leave out --vae-{name}",
                )  # fmt: skip
            for switch in switches if asked else ():
                switch()

    def _run(self, part: Req, batch: Req, config: CallConfig) -> Tensor:
        given = callarguments.arguments(part, config)
        with ExitStack() as stack:
            finite = Finite(self.name)
            given |= self._followed(batch, finite, stack)
            try:
                made = callresult.fields_of(self.pipe(**given))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UsageError(
                    f"{self.title} does not make this", expected="settings that it takes",
                    found=f"{type(error).__name__}: {error}"[:400],
                    hint="see the pipeline's documentation in diffusers; --verbose shows where it stopped",
                ) from error  # fmt: skip
            except (LookupError, AttributeError) as error:
                if part.batch_size == 1:
                    raise
                raise UsageError(
                    f"{self.title} does not make {part.batch_size} at once", expected="a seed for each",
                    found=f"{type(error).__name__}: {error}"[:200], hint="--batch-size 1; --verbose shows where",
                ) from error  # fmt: skip
            except (ImportError, NameError) as error:  # diffusers imports some packages only where they are installed
                name = getattr(error, "name", None) or str(error)[:80]
                raise UsageError(
                    f"{self.title} needs a package that is not installed", expected=name,
                    found=str(error).strip().splitlines()[0][:200], hint=f"pip install {name}",
                ) from error  # fmt: skip
            finite.last()
        for i in callresult.blackened(made):
            batch.warn(f"result {i + 1}: the port's safety checker found it unsafe and withheld it")
        if more := callresult.further(made):
            batch.warn(f"{self.title} also made {', '.join(more)}, which is not written")
        return callresult.to_tensor(made, self.title, video=config.task_type.video, count=part.batch_size)

    def _followed(self, batch: Req, finite: Finite, stack: ExitStack) -> dict[str, Any]:
        """Arguments that show each step to the taps; of calls that have none, the scheduler's steps are watched."""
        count = [0]

        def show(latents: Any, step: int) -> None:
            tensors = {"latents": latents} if isinstance(latents, Tensor) else {}
            if tensors:
                finite.check(step, latents)
            batch.tap(f"{self.name}.step.{step}", **tensors)

        def ended(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            show(kept.get("latents"), step)
            return {}

        def stepped(result: Any) -> None:
            show(result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None), count[0])
            count[0] += 1

        if "callback_on_step_end" in self.call:
            names = self.call.get("callback_on_step_end_tensor_inputs")
            more = {names.name: ["latents"]} if names is not None and names.default is None else {}
            return {"callback_on_step_end": ended, **more}
        if "callback" in self.call:
            return {"callback": lambda step, timestep, latents: show(latents, step)}
        if (scheduler := self.pipe.components.get("scheduler")) is not None:
            stack.enter_context(_watched(scheduler, stepped))
        return {}

    def _note_sizes(self, batch: Req, config: CallConfig) -> None:
        """Sizes that the call has names for, as the metadata says them; others follow from what was given."""
        assert batch.output is not None
        made = dict(zip(("height", "width"), batch.output.shape[-2:], strict=True))
        made |= {"num_frames": batch.output.shape[2]} if batch.output.ndim == 5 else {}
        for name, size in made.items():
            asked = getattr(batch, name)
            if asked is None and config.name_of(name) is not None:
                setattr(batch, name, size)
            elif asked is not None and asked != size:
                batch.warn(f"{name} {asked} was asked for; {self.title} made {size}")


class DiffusersPipeline(ComposedPipelineBase):
    """A pipeline of diffusers, built from components that our loader filled."""

    executor = "diffusers"
    pipeline_name = "any pipeline of diffusers"

    def __init__(self, pipe: Any, config: CallConfig, sampling_params: CallParams) -> None:
        self.pipe, self.pipeline_name = pipe, config.name
        super().__init__(pipe.components, config, sampling_params)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.pipe.device
        return found

    @property
    def transformers(self) -> dict[str, torch.nn.Module]:
        modules = {n: m for n, m in self.modules.items() if isinstance(m, torch.nn.Module)}
        return {n: modules[n] for n in _DENOISERS if n in modules} or modules

    def use_scheduler(self, scheduler: Any) -> None:
        super().use_scheduler(scheduler)
        self.pipe.register_modules(scheduler=scheduler)

    def create_pipeline_stages(self) -> None:
        assert isinstance(self.config, CallConfig)
        self.add_stage(CallValidationStage(self.sampling_params), "input_validation")
        self.add_stage(DiffusersStage(self.pipe, self.config), "denoising")


def load_diffusers(path: Path, *, dtype: torch.dtype, device: torch.device) -> DiffusersPipeline:
    """The pipeline of a folder with diffusers' own classes, every weight filled strictly.

    Raises:
        UsageError: a pipeline that makes no pictures, or takes what no option gives.
        BadInputError: no such pipeline, or its files do not fit together.
        CheckpointError: weights that do not fill their modules exactly.
    """
    index = read_index(path)
    cls = pipeline_class(index["_class_name"])
    config, params = describe_call(cls, index)
    taken = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    entries = {n: v for n, v in index.items() if _is_component(v)}
    unused = sorted(n for n in index if n not in taken and not n.startswith("_") and index[n] != [None, None])
    present = [n for n, (library, _) in entries.items() if library is not None and n in taken]
    loaded = load_components(path, present, native_models={}, dtype=dtype, device=device)
    settings = {n: as_declared(taken[n], v) for n, v in index.items() if n in taken and n not in entries}
    nothing = {n: None for n, p in taken.items() if required(p) and n not in loaded.modules and n not in settings}
    with quiet_libraries(), _buildable(path, cls):
        pipe = cls(**nothing, **loaded.modules, **settings)
    pipe.set_progress_bar_config(disable=True)
    made = DiffusersPipeline(pipe, config, params)
    made.warnings += loaded.warnings
    made.warnings += [f"{cls.__name__} does not use {', '.join(unused)} of model_index.json"] if unused else []
    return made


def _is_component(entry: Any) -> bool:
    """Whether an entry of model_index.json is `[library, class]`, or `[null, null]`; lists may be settings too."""
    return isinstance(entry, list) and len(entry) == 2 and ({type(each) for each in entry} in ({str}, {type(None)}))


@contextmanager
def _buildable(path: Path, cls: Any) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AttributeError, ImportError, KeyError, RuntimeError) as error:
        raise BadInputError(
            f"{path} does not build {cls.__name__}", found=f"{type(error).__name__}: {error}"[:300],
            hint=f"porter plan {path}",
        ) from error  # fmt: skip


@contextmanager
def _watched(scheduler: Any, stepped: Any) -> Iterator[None]:
    """Tell `stepped` what each step of a scheduler returns."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def shown(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        stepped(result)
        return result

    scheduler.step = shown
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _heard(batch: Req) -> Iterator[None]:
    """What the libraries log while a pipeline runs (prompts cut short, settings without effect) as our warnings."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            batch.warn(" ".join(record.getMessage().split())[:400])

    handler, loggers = Handler(logging.WARNING), [logging.getLogger(n) for n in ("diffusers", "transformers")]
    before = [each.handlers for each in loggers]
    for each in loggers:
        each.handlers = [handler]
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("ignore", DeprecationWarning)  # of no use to who runs a port
            yield
    finally:
        for each, handlers in zip(loggers, before, strict=True):
            each.handlers = handlers
        for one in told:
            batch.warn(" ".join(str(one.message).split())[:400])
