"""The executor `diffusers`: any pipeline that diffusers can run, between the same stages, with the same metadata.

Which settings a request may bring is read off the signature of the pipeline's own call; nothing that was asked for is
left out without a word.  B: images, F: frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porter.core.errors import BadInputError, CheckFailed, UsageError
from runtime.attention import attention_backend
from runtime.backends import TORCH_BACKENDS
from runtime.config import PipelineConfig, SamplingParams, TaskType
from runtime.loader import load_components, quiet_libraries, read_index
from runtime.pipeline import ComposedPipelineBase
from runtime.request import Req
from runtime.stages import InputValidationStage, PipelineStage, VerificationResult

# Fields of a request by the names that pipelines' calls have for them.
_FIELDS = (
    "prompt", "negative_prompt", "image", "last_image", "mask_image", "height", "width", "num_frames",
    "num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "max_sequence_length", "sigmas",
)  # fmt: skip
_NUMBERS = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale",
    "max_sequence_length",
)  # fmt: skip
# What a call takes from the executor alone, and what only Python code can give.
_OURS = ("self", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
_CODE = ("callback", "latents", "embeds", "kwargs", "mask_image_latents", "pooled", "prompt_attention_mask")
_REPORTED = ("image", "last_image", "mask_image", "num_frames")  # by the standard checks
_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class CallParams(SamplingParams):
    """Defaults of a pipeline's call."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, Any]:
        return dict(self.settings)


@dataclass
class CallConfig(PipelineConfig):
    """What a pipeline's call says of its task."""

    known: frozenset[str] = frozenset()  # parameters of the call
    needs_image: bool = False
    multiple: int = 1

    def images(self) -> tuple[int, int | None]:
        return (int(self.needs_image), None) if "image" in self.known else (0, 0)

    def size_multiple(self) -> int:
        return self.multiple

    def default_size(self, batch: Req) -> tuple[int | None, int | None]:  # type: ignore[override]
        return None, None  # the call has its own

    def guides(self, batch: Req) -> bool:
        return False  # the call guides by itself


class CallValidationStage(InputValidationStage):
    """The standard checks, and that the call has a name for all that is asked."""

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = super().verify_input(batch, config)
        assert isinstance(config, CallConfig)
        for name in _FIELDS:
            value = getattr(batch, name)
            empty = name == "prompt" and not "".join(batch.prompts)
            if value is not None and name not in config.known and not empty and name not in _REPORTED:
                result.add_check(name, value, False, "nothing: this pipeline does not take it")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        self.sampling_params.fill(batch)
        if batch.generator is None:
            assert batch.seed is not None  # filled above
            batch.generator = [torch.Generator("cpu").manual_seed(batch.seed + i) for i in range(batch.batch_size)]
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        return VerificationResult()


class DiffusersStage(PipelineStage):
    """Runs the whole of a diffusers pipeline; its steps are shown to the taps where it calls back."""

    given_name = "denoising"

    def __init__(self, pipe: Any, accepted: Mapping[str, inspect.Parameter]) -> None:
        self.pipe, self.accepted = pipe, accepted

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        given = self._arguments(batch)
        with attention_backend(config.attention_backend, TORCH_BACKENDS):
            try:
                made = self.pipe(**given)
            except _ERRORS as error:
                if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                    raise
                raise UsageError(
                    f"{type(self.pipe).__name__} does not make this", expected="settings that it takes",
                    found=f"{type(error).__name__}: {error}"[:400],
                    hint="see the pipeline's documentation in diffusers; --verbose shows where it stopped",
                ) from error  # fmt: skip
        batch.output = _pictures(made, type(self.pipe).__name__)
        batch.height, batch.width = batch.output.shape[-2:]
        batch.num_frames = batch.output.shape[2] if batch.output.ndim == 5 else None
        batch.tap(self.name, image=batch.output)
        return batch

    def _arguments(self, batch: Req) -> dict[str, Any]:
        """The call's arguments: what the request sets, under the names that the call has.

        Raises:
            UsageError: something that it has no name for.
        """
        given = {n: v for n in _FIELDS if (v := getattr(batch, n)) is not None} | {
            name: value for name, value in batch.extra.items() if value is not self.accepted[name].default
        }
        if isinstance(given.get("image"), list) and len(given["image"]) == 1:
            given["image"] = given["image"][0]
        if "prompt" not in self.accepted and not "".join(batch.prompts):
            given.pop("prompt", None)
        if unknown := sorted(given.keys() - self.accepted.keys()):
            raise UsageError(
                f"{type(self.pipe).__name__} does not take {', '.join(unknown)}",
                expected=", ".join(sorted(self.accepted)), hint="leave it out, or see porter generate --help",
            )  # fmt: skip
        more = next((n for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in self.accepted), None)
        if batch.num_images > 1 and more:
            given[more] = batch.num_images
        elif batch.num_images > 1:
            given["prompt"] = [prompt for prompt in batch.prompts for _ in range(batch.num_images)]
        if "generator" in self.accepted:
            made = batch.generator or []
            given["generator"] = made[0] if len(made) == 1 else made
        if "output_type" in self.accepted:
            given["output_type"] = "pt"
        if "callback_on_step_end" in self.accepted:
            given["callback_on_step_end"] = self._stepped(batch)
        return given

    def _stepped(self, batch: Req) -> Any:
        def after(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            latents = kept.get("latents")
            if isinstance(latents, Tensor):
                if not bool(latents.isfinite().all()):
                    raise CheckFailed(
                        f"{self.name}: the latents are not finite after step {step}", expected="numbers",
                        found="NaN or infinity", hint="run it again with --dtype float32",
                    )  # fmt: skip
                batch.tap(f"{self.name}.step.{step}", latents=latents)
            return {}

        return after

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        made = batch.output
        fits = made is not None and made.shape[0] == batch.batch_size and bool(made.isfinite().all())
        result.add_check("output", made, fits, f"{batch.batch_size} finite pictures or videos")
        return result


class DiffusersPipeline(ComposedPipelineBase):
    """A pipeline of diffusers, built from components that our loader filled."""

    executor = "diffusers"
    pipeline_name = "any pipeline of diffusers"

    def __init__(self, pipe: Any, config: CallConfig, sampling_params: CallParams, accepted: Any) -> None:
        self.pipe, self.accepted = pipe, accepted
        self.pipeline_name = type(pipe).__name__
        super().__init__(pipe.components, config, sampling_params)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.pipe.device
        return found

    @property
    def transformers(self) -> dict[str, torch.nn.Module]:
        return {"denoiser": self.denoiser}

    @property
    def denoiser(self) -> torch.nn.Module:
        names = ("transformer", "unet", "prior")
        modules = [m for n in names if isinstance(m := self.modules.get(n), torch.nn.Module)]
        modules += [m for m in self.modules.values() if isinstance(m, torch.nn.Module)]
        return modules[0]

    def use_scheduler(self, scheduler: Any) -> None:
        super().use_scheduler(scheduler)
        self.pipe.register_modules(scheduler=scheduler)

    def create_pipeline_stages(self) -> None:
        self.add_stage(CallValidationStage(self.sampling_params), "input_validation")
        self.add_stage(DiffusersStage(self.pipe, self.accepted), "denoising")


def pipeline_class(name: str) -> Any:
    """The pipeline class of diffusers that model_index.json names.

    Raises:
        BadInputError: the installed diffusers has none of this name.
    """
    import diffusers

    with quiet_libraries():  # what they say while they are imported
        found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise BadInputError(
            f"nothing runs {name}", expected="a pipeline that a family runs, or one of diffusers'",
            found=f"diffusers {diffusers.__version__} has no such pipeline", hint="pip install --upgrade diffusers",
        )  # fmt: skip
    return found


def describe_call(cls: Any, index: Mapping[str, Any]) -> tuple[CallConfig, CallParams, dict[str, inspect.Parameter]]:
    """What the call of a pipeline class takes: facts, defaults, parameters by name."""
    accepted = {
        name: parameter
        for name, parameter in inspect.signature(cls.__call__).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    default = {n: p.default for n, p in accepted.items() if p.default is not inspect.Parameter.empty}
    numbers = {n: default[n] if isinstance(default.get(n), int | float) else None for n in _NUMBERS}
    settings = {
        name: default.get(name) for name in accepted
        if name not in (*_FIELDS, *_OURS) and not any(word in name for word in _CODE)
    }  # fmt: skip
    video = "num_frames" in accepted or "num_videos_per_prompt" in accepted
    config = CallConfig(
        task_type=TaskType.T2V if video else TaskType.T2I, model_index=index, known=frozenset(accepted),
        needs_image="image" in accepted and accepted["image"].default is inspect.Parameter.empty,
        takes_mask="mask_image" in accepted, takes_last_image="last_image" in accepted,
        should_use_guidance="guidance_scale" in accepted, further_scales=("guidance_scale_2", "true_cfg_scale"),
        cfg_field="true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale",
    )  # fmt: skip
    return config, CallParams(**numbers, settings=settings), accepted  # type: ignore[arg-type]


def load_diffusers(path: Path, *, dtype: torch.dtype, device: torch.device) -> DiffusersPipeline:
    """The pipeline of a folder with diffusers' own classes, every weight filled strictly.

    Raises:
        BadInputError: no such pipeline, or its files do not fit together.
        CheckpointError: weights that do not fill their modules exactly.
    """
    index = read_index(path)
    cls = pipeline_class(index["_class_name"])
    names = {n for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    entries = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2 and n in names}
    present = [n for n, (library, _) in entries.items() if library is not None]
    loaded = load_components(path, present, native_models={}, dtype=dtype, device=device)
    settings = {n: v for n, v in index.items() if n in names and not isinstance(v, list)}
    with quiet_libraries(), _buildable(path, cls):
        pipe = cls(**{n: loaded.modules.get(n) for n in entries}, **settings)
    pipe.set_progress_bar_config(disable=True)
    config, params, accepted = describe_call(cls, index)
    made = DiffusersPipeline(pipe, config, params, accepted)
    made.warnings += loaded.warnings
    return made


@contextmanager
def _buildable(path: Path, cls: Any) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise BadInputError(
            f"{path} does not build {cls.__name__}", found=f"{type(error).__name__}: {error}"[:300],
            hint=f"porter plan {path}",
        ) from error  # fmt: skip


def _pictures(made: Any, name: str) -> Tensor:
    """(B, 3, H, W), or (B, 3, F, H, W), in [0, 1] of what a call returned.

    Raises:
        UsageError: it made something else.
    """
    found = made.images if hasattr(made, "images") else getattr(made, "frames", None)
    if isinstance(found, list) and found and all(isinstance(each, Tensor) for each in found):
        found = torch.stack(found)
    if not isinstance(found, Tensor) or found.ndim not in (4, 5):
        raise UsageError(
            f"{name} makes neither pictures nor videos", expected="images or frames",
            found=", ".join(getattr(made, "keys", lambda: [type(made).__name__])()), hint="run it with diffusers",
        )  # fmt: skip
    return found if found.ndim == 4 else found.transpose(1, 2)  # (B, F, 3, H, W) -> (B, 3, F, H, W)
