"""A pipeline: its modules, its config, and stages that run one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from porter.core.errors import BadInputError, UsageError
from runtime.config import PipelineConfig, SamplingParams
from runtime.loader import load_components, read_index
from runtime.lora import LoraStack
from runtime.memory import device_of
from runtime.memory.options import EVERYTHING, Memory
from runtime.quality import Quality, at_quality
from runtime.request import Req
from runtime.stages import (
    DecodingStage,
    DenoisingStage,
    ImageEncodingStage,
    ImageVAEEncodingStage,
    InputValidationStage,
    LatentPreparationStage,
    PipelineStage,
    TextEncodingStage,
    TimestepPreparationStage,
)


class ComposedPipelineBase(ABC):
    """Base of every family's EntryClass.

    Attributes:
        pipeline_name: `_class_name` in model_index.json.
        native_models: class name in model_index.json -> our module for it; every other class is the library's.
        denoisers: components that predict; the config selects one at each step.
        _required_config_modules: components that the pipeline can't run without.
        _optional_config_modules: components that it uses where model_index.json has them.
    """

    executor: ClassVar[str] = "native"
    pipeline_name: str
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {}
    denoisers: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    _required_config_modules: ClassVar[tuple[str, ...]] = ()
    _optional_config_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, modules: Mapping[str, Any], config: PipelineConfig, sampling_params: SamplingParams) -> None:
        """Wire `modules` (component name -> loaded object) into stages.

        Raises:
            BadInputError: a component that the pipeline needs is missing.
        """
        if missing := sorted(set(self._required_config_modules) - modules.keys()):
            raise BadInputError(
                f"{self.pipeline_name} lacks {', '.join(missing)}",
                expected=", ".join(self._required_config_modules),
                found=", ".join(modules),
                hint="convert the model again: porter convert <model> -o <port> --overwrite",
            )
        self.modules, self.config, self.sampling_params = dict(modules), config, sampling_params
        self.stages: dict[str, PipelineStage] = {}
        self.warnings: list[str] = []
        self.running: str | None = None  # the stage that runs, or ran last
        self.quality: Quality = "lossless"
        self.loras = LoraStack(self)
        self.create_pipeline_stages()

    @classmethod
    def from_folder(
        cls,
        path: Path,
        config: PipelineConfig,
        sampling_params: SamplingParams,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory = EVERYTHING,
    ) -> Self:
        """Load the components of a pipeline folder and wire them. Errors: see `load_components`."""
        index = read_index(path)
        present = [name for name in cls._optional_config_modules if (index.get(name) or [None])[0] is not None]
        names = [*cls._required_config_modules, *present]
        precisions = {"vae": getattr(torch, config.vae_precision)} if config.vae_precision else {}
        loaded = load_components(
            path, names, native_models=cls.native_models, dtype=dtype, device=device, memory=memory,
            denoisers=cls.denoisers, precisions=precisions,
        )  # fmt: skip
        pipeline = cls(loaded.modules, config, sampling_params)
        pipeline.warnings += loaded.warnings
        return pipeline

    @property
    def denoiser(self) -> nn.Module:
        """The module that predicts, the first where there are two."""
        return next(iter(self.transformers.values()))

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return device_of(self.denoiser)

    @abstractmethod
    def create_pipeline_stages(self) -> None:
        """Add the stages, in order, with `add_stage` or one of the standard sets."""

    def use_scheduler(self, scheduler: Any) -> None:
        """Replace the scheduler, in every stage that has it."""
        self.modules["scheduler"] = scheduler
        for stage in self.stages.values():
            if hasattr(stage, "scheduler"):
                stage.scheduler = scheduler

    def add_stage(self, stage: PipelineStage, name: str | None = None) -> None:
        """Append `stage`; a second stage of the same name is an error."""
        name = name or stage.name
        if name in self.stages:
            raise UsageError(f"{self.pipeline_name} has two stages called {name}", hint="give add_stage a name")
        stage.given_name = name
        self.stages[name] = stage

    def add_standard_t2i_stages(self, *, text_encoding: PipelineStage | None = None) -> None:
        """Text to image: validate, encode, schedule, noise, loop, decode.

        Args:
            text_encoding: the family's own, instead of the standard stage.
        """
        self._add_beginning(text_encoding)
        self.add_standard_denoising_stages()

    def add_standard_ti2i_stages(
        self, *, text_encoding: PipelineStage | None = None, latent_preparation: PipelineStage | None = None
    ) -> None:
        """Text and images to image: as `add_standard_t2i_stages`, and the pictures' latents after the noise.

        Args:
            text_encoding, latent_preparation: the family's own, instead of the standard stages.
        """
        self._add_beginning(text_encoding, latent_preparation)
        self.add_stage(ImageVAEEncodingStage(self.modules["vae"], self.modules["transformer"]))
        self.add_standard_denoising_stages()

    def add_standard_ti2v_stages(self, *, text_encoding: PipelineStage | None = None) -> None:
        """Text and image to video: as `add_standard_ti2i_stages`, and the vision encoder where there is one."""
        self._add_beginning(text_encoding)
        if (encoder := self.modules.get("image_encoder")) is not None:
            self.add_stage(ImageEncodingStage(encoder, self.modules["image_processor"]))
        self.add_stage(ImageVAEEncodingStage(self.modules["vae"], self.modules["transformer"]))
        self.add_standard_denoising_stages()

    def add_standard_denoising_stages(self) -> None:
        """The loop and the decoder: what follows a Hybrid pipeline's `BeforeDenoisingStage`."""
        self.add_stage(DenoisingStage(self.transformers, self.modules["scheduler"]))
        self.add_stage(DecodingStage(self.modules["vae"]))

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """The denoisers by component name, the first one first."""
        return {name: self.modules[name] for name in self.denoisers if self.modules.get(name) is not None}

    def _add_beginning(
        self, text_encoding: PipelineStage | None, latent_preparation: PipelineStage | None = None
    ) -> None:
        get, specs = self.modules, self.config.text_encoders
        encoders = {spec.encoder: get[spec.encoder] for spec in specs}
        tokenizers = {spec.tokenizer: get[spec.tokenizer] for spec in specs}
        self.add_stage(InputValidationStage(self.sampling_params))
        self.add_stage(text_encoding or TextEncodingStage(encoders, tokenizers), "text_encoding")
        self.add_stage(TimestepPreparationStage(get["scheduler"], self.device))
        latents = latent_preparation or LatentPreparationStage(self.denoiser)
        self.add_stage(latents, "latent_preparation")

    @torch.no_grad()
    def forward(self, batch: Req) -> Req:
        """Run every stage on `batch`, which is changed and returned; pictures are in `batch.output`.

        Raises:
            UsageError: the request asks for what cannot be made.
            CheckFailed: a step ended in numbers that are not finite.
        """
        with at_quality(self.quality), self.loras.using(batch.loras):
            for name, stage in self.stages.items():
                self.running = name
                batch = stage(batch, self.config)
        return batch

    def generate(self, prompt: str | list[str], **fields: Any) -> Req:
        """`forward` on a new request; `fields` are those of `Req`."""
        return self.forward(Req(prompt=prompt, **fields))
