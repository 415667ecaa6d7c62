"""From the class name in model_index.json to the pipeline that runs it.

A family's pipeline module calls `register_configs` and `register_pipeline` when it is imported. The import happens
here, through the family's record, when its pipeline is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from porter.core.errors import BadInputError, UsageError
from porter.core.family import Family, families, resolve
from runtime.compiled import compile_blocks
from runtime.config import PipelineConfig, SamplingParams
from runtime.loader import read_configs, read_index
from runtime.memory.options import EVERYTHING, read_memory
from runtime.parallel import mesh
from runtime.parallel.mesh import Parallel
from runtime.pipeline import ComposedPipelineBase
from runtime.quality import LEVELS, Quality
from runtime.schedulers import exchanged
from runtime.stages import InputValidationStage

Detector = Callable[[Mapping[str, dict[str, Any]]], bool]  # component configs by name -> whether this is the model


@dataclass(frozen=True)
class ModelConfigs:
    """Configs of one model; several models may share a pipeline class."""

    sampling_param_cls: type[SamplingParams]
    pipeline_config_cls: type[PipelineConfig]
    hf_model_paths: tuple[str, ...]
    model_detectors: tuple[Detector, ...]


_pipelines: dict[str, type[ComposedPipelineBase]] = {}
_configs: dict[str, list[ModelConfigs]] = {}


def register_pipeline(cls: type[ComposedPipelineBase]) -> type[ComposedPipelineBase]:
    """Make `cls` the pipeline of its `pipeline_name`. Raises UsageError when the name is taken."""
    if cls.pipeline_name in _pipelines:
        raise UsageError(f"two pipelines claim {cls.pipeline_name}", found=f"{_pipelines[cls.pipeline_name]} and {cls}")
    _pipelines[cls.pipeline_name] = cls
    return cls


def register_configs(
    pipeline_name: str,
    *,
    sampling_param_cls: type[SamplingParams],
    pipeline_config_cls: type[PipelineConfig],
    hf_model_paths: tuple[str, ...] = (),
    model_detectors: tuple[Detector, ...] = (),
) -> None:
    """Register the configs of one model. Models are recognised by the hub id in their files' notes or by a detector;
    the pipeline's first registration serves every other model.

    Raises:
        UsageError: a hub id is registered twice.
    """
    taken = {path for models in _configs.values() for model in models for path in model.hf_model_paths}
    if twice := sorted(taken & set(hf_model_paths)):
        raise UsageError(f"model registered twice: {', '.join(twice)}")
    model = ModelConfigs(sampling_param_cls, pipeline_config_cls, hf_model_paths, model_detectors)
    _configs.setdefault(pipeline_name, []).append(model)


def entry_class(pipeline_name: str) -> type[ComposedPipelineBase]:
    """The pipeline registered for `pipeline_name`; its family is imported when it is asked for the first time.

    Raises:
        BadInputError: no family runs this pipeline natively.
    """
    known = families().values()
    if pipeline_name not in _pipelines:
        for family in known:
            if pipeline_name in family.native_pipelines:
                import_pipelines(family)
    if pipeline_name not in _pipelines:
        raise BadInputError(
            f"no family runs {pipeline_name} on the native runtime",
            expected=", ".join(
                sorted({name for family in known for name in family.native_pipelines} | set(_pipelines))
            ),
            found=pipeline_name,
            hint="porter families",
        )
    return _pipelines[pipeline_name]


def runs_natively(pipeline_name: str) -> bool:
    """Whether a family has a native pipeline of this name; none is imported to find out."""
    return pipeline_name in _pipelines or any(pipeline_name in f.native_pipelines for f in families().values())


def import_pipelines(family: Family) -> None:
    """Import the module that registers the pipelines of `family`.

    Raises:
        BadInputError: its entry classes are not those that its record promises, or not registered.
    """
    found = resolve(family.pipeline) if family.pipeline else ()
    names = [cls.pipeline_name for cls in (found if isinstance(found, list | tuple) else (found,))]
    if sorted(names) != sorted(family.native_pipelines) or not _pipelines.keys() >= set(names):
        raise BadInputError(
            f"the record of {family.title} and its pipelines disagree",
            expected=f"native_pipelines, registered each: {', '.join(family.native_pipelines) or 'none'}",
            found=f"entry classes {', '.join(names) or 'none'}, registered {', '.join(sorted(_pipelines))}",
            hint=f"mend native_pipelines of {family.name}, or the module of {family.pipeline}",
        )


def model_configs(pipeline_name: str, configs: Mapping[str, dict[str, Any]]) -> ModelConfigs:
    """The configs of the model whose component configs are `configs`.

    Raises:
        UsageError: nothing is registered for the pipeline.
    """
    models = _configs.get(pipeline_name, [])
    if not models:
        raise UsageError(f"{pipeline_name} has no configs", hint="call register_configs beside the pipeline")
    notes = {str(config.get("_name_or_path")) for config in configs.values()}
    for model in models:
        if notes & set(model.hf_model_paths) or any(detects(configs) for detects in model.model_detectors):
            return model
    return models[0]


EXECUTORS = ("auto", "native", "diffusers")


@dataclass(frozen=True)
class Model:
    """A pipeline folder as its small files describe it: who runs it, and with which facts and defaults.

    `pipeline_cls` is None where diffusers' own pipeline runs it.
    """

    pipeline_cls: type[ComposedPipelineBase] | None
    config: PipelineConfig
    sampling_params: SamplingParams

    @property
    def executor(self) -> str:
        """`native` or `diffusers`."""
        return "native" if self.pipeline_cls is not None else "diffusers"

    def validation(self) -> InputValidationStage:
        """The stage that refuses requests which cannot be made, before weights are loaded."""
        if self.pipeline_cls is not None:
            return InputValidationStage(self.sampling_params)
        from runtime.diffusers_executor import CallValidationStage

        return CallValidationStage(self.sampling_params)


def describe(path: Path, executor: str = "auto") -> Model:
    """Read a pipeline folder's JSON files; no weights.

    Args:
        executor: `native`, `diffusers`, or `auto`: native where a family has it.

    Raises:
        MissingError: no such folder.
        BadInputError: not a pipeline folder, or a pipeline that the executor does not know.
        UsageError: no such executor.
    """
    if executor not in EXECUTORS:
        raise UsageError(f"no executor {executor}", expected=" | ".join(EXECUTORS), found=executor)
    index = read_index(path)
    name = index["_class_name"]
    if executor == "diffusers" or (executor == "auto" and not runs_natively(name)):
        from runtime.calls import describe_call, pipeline_class

        call, defaults = describe_call(pipeline_class(name), index)
        return Model(None, call, defaults)
    cls = entry_class(name)
    configs = read_configs(path, (*cls._required_config_modules, *cls._optional_config_modules))
    model = model_configs(name, configs)
    config = model.pipeline_config_cls(
        configs=configs,
        model_index=index,
        dit_config=configs.get("transformer", {}),
        vae_config=configs.get("vae", {}),
        scheduler_config=configs.get("scheduler", {}),
    )
    return Model(cls, config, model.sampling_param_cls())


@dataclass(frozen=True)
class RunOptions:
    """How a pipeline is loaded and run; none of it changes what is asked for.

    Attributes:
        dtype: of all weights; None: bfloat16 on CUDA, float32 elsewhere.
        device: None: CUDA where there is one, otherwise the CPU.
        executor: see `describe`.
        quality: see `runtime.quality`.
        attention: a backend of `runtime.attention`.
        scheduler: class of diffusers instead of the port's, with the port's settings.
        offload: `none`; `component`: weights are on the device only while their component is used; `layer`: and of its
            repeated blocks two at a time.
        weights: of denoisers; None: as stored; `fp8`; `gguf:FILE`. Both need quality `lossy`.
        vae_tiling, vae_slicing: decode large pictures in tiles, batches one by one.
        compiled: compile the denoiser's blocks; the first step waits for it.
        parallel: how many processes share a picture; `runtime.parallel.mesh.start` must hold around the run.
    """

    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    executor: str = "auto"
    quality: Quality = "lossless"
    attention: str = "sdpa"
    scheduler: str | None = None
    offload: str = "none"
    weights: str | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    compiled: bool = False
    parallel: Parallel = field(default_factory=Parallel)


def load(port: str | Path, options: RunOptions | None = None, **fields: Any) -> ComposedPipelineBase:
    """The pipeline of a port folder (or of any pipeline folder in the diffusers layout), ready to generate.

    Args:
        port: the folder.
        options: how; or its fields by name, as in `load(port, dtype=torch.bfloat16)`.

    Raises:
        MissingError: no such folder.
        BadInputError: not a pipeline folder, a pipeline that nothing runs, or files that do not fit together.
        UsageError: the device is not there; an option that nothing has.
    """
    known = options or RunOptions(**fields)
    run = mesh.current()
    path, device = Path(port), run.device if run is not None else pick_device(known.device)
    dtype = known.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if known.quality not in LEVELS:
        raise UsageError(f"no quality {known.quality}", expected=" | ".join(LEVELS), found=str(known.quality))
    memory = read_memory(known.offload, known.weights, known.quality)
    if known.compiled and memory.offload != "none":
        raise UsageError(
            "compiled code holds on to the weights that it was made for, and offload gives them anew",
            expected="--offload, or --compile", found="both", hint="leave out --compile",
        )  # fmt: skip
    model = describe(path, known.executor)
    _check_parallel(known, model)
    if model.pipeline_cls is None:
        from runtime.diffusers_executor import load_diffusers

        if memory != EVERYTHING:
            raise UsageError(
                "diffusers' own pipeline has all its weights on the device, as they are stored",
                expected="a native pipeline", found=f"offload {known.offload}, weights {known.weights or 'as stored'}",
                hint="leave out --offload and --weights",
            )  # fmt: skip
        pipeline: ComposedPipelineBase = load_diffusers(path, dtype=dtype, device=device)
    else:
        pipeline = model.pipeline_cls.from_folder(
            path, model.config, model.sampling_params, dtype=dtype, device=device, memory=memory
        )
    if known.scheduler is not None:
        pipeline.use_scheduler(exchanged(pipeline.modules.get("scheduler"), known.scheduler))
    config = pipeline.config
    config.attention_backend, pipeline.quality = known.attention, known.quality
    config.vae_tiling, config.vae_slicing = known.vae_tiling, known.vae_slicing
    if known.compiled:
        for denoiser in pipeline.transformers.values():
            compile_blocks(denoiser)
    return pipeline


def _check_parallel(known: RunOptions, model: Model) -> None:
    """Refuse what several processes cannot share, before weights are read.

    Raises:
        UsageError: diffusers' own pipeline, exact arithmetic, or heads that cannot be shared.
    """
    if known.parallel.processes == 1:
        return
    if model.executor != "native":
        raise UsageError(
            "diffusers' own pipeline runs in one process", expected="a native pipeline: porter families",
            found=str(known.parallel), hint="leave out --tp, --ulysses, --ring and --cfg-parallel",
        )  # fmt: skip
    if known.quality == "exact" and known.parallel.processes > known.parallel.cfg:
        raise UsageError(
            "several processes add up in another order", expected="--quality lossless", found="--quality exact",
            hint="leave out --quality, or --tp, --ulysses and --ring",
        )  # fmt: skip
    known.parallel.check_heads(model.config.dit_config)


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device to run on. Raises UsageError for a name that torch does not know or cannot reach."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" exists, and holds nothing
    except (RuntimeError, AssertionError) as error:
        found = str(error).splitlines()[0]
        raise UsageError(f"device {name} is not available", found=found, hint="--device cpu") from error
    return device
