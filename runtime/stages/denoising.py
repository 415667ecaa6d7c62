"""The loop: one for all families.  B: images; latents keep the model's packing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from porter.core.errors import CheckFailed
from runtime.attention import attention_backend
from runtime.config import PipelineConfig
from runtime.memory import using
from runtime.parallel import mesh
from runtime.parallel.guidance import predict
from runtime.request import Req

from .base import PipelineStage, VerificationResult
from .text_encoding import module_dtype

_CONDITIONS = (
    "prompt_embeds", "prompt_masks", "pooled_embeds", "negative_prompt_embeds", "negative_prompt_masks",
    "negative_pooled_embeds", "image_embeds", "image_latents",
)  # fmt: skip


class DenoisingStage(PipelineStage):
    """Predicts and steps from noise to latents; each step is shown to the taps."""

    def __init__(self, transformers: Mapping[str, nn.Module], scheduler: Any) -> None:
        """`transformers`: the pipeline's denoisers by component; the config selects one at each step."""
        self.transformers, self.scheduler = dict(transformers), scheduler

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        for name in ("latents", "timesteps"):
            value = getattr(batch, name)
            result.add_check(name, value, isinstance(value, Tensor), "a tensor")
        result.add_check("prompt_embeds", batch.prompt_embeds, bool(batch.prompt_embeds), "a tensor for each encoder")
        here = batch.latents.device if batch.latents is not None else None
        for name in _CONDITIONS:
            given = getattr(batch, name)
            for tensor in given if isinstance(given, list) else [given]:
                fits = tensor is None or here is None or tensor.device == here
                where = "nowhere" if tensor is None else str(tensor.device)
                result.add_check(name, f"on {where}", fits, f"a tensor on {here}, where the denoiser is")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        assert batch.latents is not None and batch.timesteps is not None  # verified
        device, kind = batch.latents.device, batch.latents.dtype
        first = next(iter(self.transformers.values()))
        with using(first):
            freqs_cis = config.get_freqs_cis(batch, first, device)
        positive = config.prepare_pos_cond_kwargs(batch, freqs_cis, device)
        negative = (
            config.prepare_neg_cond_kwargs(batch, freqs_cis, device) if batch.do_classifier_free_guidance else None
        )
        if (run := mesh.current()) is not None:
            run.settings.check_guidance(negative is not None)
        supported = getattr(first, "supported_attention_backends", ("sdpa",))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.enable_autocast)
        finite = Finite(self.name)
        with attention_backend(config.attention_backend, supported), autocast, _Selected() as selected:
            for step, t in enumerate(batch.timesteps):
                transformer = self.transformers[config.select_transformer(self.transformers, batch, t)]
                selected.use(transformer)
                noise_pred = self._predict(transformer, step, t, positive, negative, batch, config)
                latents = self.scheduler.step(noise_pred, t, batch.latents, return_dict=False)[0].to(kind)
                finite.check(step, latents)
                batch.latents = latents
                batch.tap(f"{self.name}.step.{step}", noise_pred=noise_pred, latents=latents)
        finite.last()
        batch.tap(self.name, latents=batch.latents)
        return batch

    def _predict(
        self, transformer: nn.Module, step: int, t: Tensor, positive: Mapping[str, Any],
        negative: Mapping[str, Any] | None, batch: Req, config: PipelineConfig,
    ) -> Tensor:  # fmt: skip
        """The prediction for one step, guided where the request asks for it."""
        assert batch.latents is not None
        timestep = config.scale_timestep(t.expand(batch.latents.shape[0]), batch)  # (B,)
        hidden_states = config.prepare_model_input(batch.latents, batch).to(module_dtype(transformer))

        scale = config.cfg_scale(batch, step, t) if negative is not None else None
        common = {"hidden_states": hidden_states, "timestep": timestep}

        def run(*conditions: Mapping[str, Any]) -> list[Tensor]:
            made = predict(transformer, [{**common, **condition} for condition in conditions])
            return [config.post_model(prediction, batch) for prediction in made]

        if negative is None or scale is None:
            return run(positive)[0]
        conditional, opposite = run(positive, negative)
        guided = config.combine_guidance(conditional, opposite, scale, batch)
        return config.guide_further(guided, conditional, lambda **more: run({**positive, **more})[0], batch, step)

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        result.add_check("latents", batch.latents, batch.latents is not None, "a tensor")
        return result


class _Selected:
    """The denoiser whose weights are on the device: from its first step to the first one of another."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Selected:
        return self

    def use(self, module: nn.Module) -> None:
        """Have this one, and no other."""
        if module is not self._module:
            self._stack.close()
            self._stack.enter_context(using(module))
            self._module = module

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Finite:
    """Stops at the first step whose latents are no numbers. A step is asked after the next one was started, so that
    an accelerator never waits for the answer."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.asked: tuple[int, Tensor] | None = None

    def check(self, step: int, latents: Tensor) -> None:
        """Note step `step`, and read the answer of the one before.

        Raises:
            CheckFailed: its latents are not finite.
        """
        before, self.asked = self.asked, (step, latents.isfinite().all())
        self._read(before)

    def last(self) -> None:
        """Read the answer of the last step. Raises CheckFailed as `check`."""
        self._read(self.asked)

    def _read(self, asked: tuple[int, Tensor] | None) -> None:
        if asked is not None and not bool(asked[1]):
            raise CheckFailed(
                f"{self.stage}: the latents are not finite after step {asked[0]}",
                expected="numbers", found="NaN or infinity",
                hint="run it again with --dtype float32; if it stays: porter parity <port>",
            )  # fmt: skip
