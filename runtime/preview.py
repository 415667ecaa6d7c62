"""Pictures of a result while it is made: what the model expects the end to be, decoded every few steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from runtime import outputs
from runtime.outputs import Target
from runtime.request import Req


@contextmanager
def previewing(pipeline: Any, batch: Req, targets: Sequence[Target], every: int) -> Iterator[None]:
    """Write a preview beside each target after `every` steps; they are gone when the block ends. 0: none.

    Raises:
        ResourceError: a preview cannot be written.
    """
    if every < 1 or "decoding" not in pipeline.stages:
        if every >= 1:
            batch.warn(f"no previews: {pipeline.pipeline_name} decodes by itself")
        yield
        return

    def tap(name: str, tensors: Mapping[str, Tensor]) -> None:
        found = re.fullmatch(r"denoising\.step\.(\d+)", name)
        if not found or (int(found[1]) + 1) % every or int(found[1]) + 1 == batch.num_inference_steps:
            return
        shown = copy.copy(batch)
        shown.taps, shown.output = [], None
        shown.latents = expected_end(pipeline.modules["scheduler"], int(found[1]), tensors)
        made: Tensor = pipeline.stages["decoding"](shown, pipeline.config).output
        for target, row in zip(targets, made, strict=True):
            outputs.write_preview(target, row)

    batch.taps.append(tap)
    try:
        yield
    finally:
        batch.taps.remove(tap)
        for target in targets:
            target.preview.unlink(missing_ok=True)


def expected_end(scheduler: Any, step: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """Where a straight line from the latents after `step` along the prediction ends, for schedulers that flow.

    Others' latents are shown as they are.
    """
    latents, sigmas = tensors["latents"], getattr(scheduler, "sigmas", None)
    if sigmas is None or not type(scheduler).__name__.startswith("FlowMatch") or step + 1 >= len(sigmas):
        return latents
    return latents - float(sigmas[step + 1]) * tensors["noise_pred"].to(latents.dtype)
