"""From a request to the arguments of a diffusers pipeline's call."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from runtime.calls import NAMES, CallConfig, as_declared, takes_lists
from runtime.request import Req

_ENCODED = re.compile(r"(negative_)?prompt_\d")  # a prompt for one of several encoders


def parts(batch: Req, config: CallConfig) -> Iterator[Req]:
    """The whole request, or one result after the other where the call takes no more at once."""
    prompt = config.call.get("prompt")
    batches = takes_lists(prompt) if prompt is not None else "batch_size" in config.call
    if batches or batch.batch_size == 1:
        yield batch
        return
    assert batch.generator is not None  # by the validation
    prompts = [p for p in batch.prompts for _ in range(batch.num_images)]
    negatives = [n for n in batch.negative_prompts for _ in range(batch.num_images)]
    for text, negative, generator in zip(prompts, negatives, batch.generator, strict=True):
        one = copy.copy(batch)
        one.prompt, one.num_images, one.generator = text, 1, [generator]
        one.negative_prompt = None if batch.negative_prompt is None else negative
        yield one


def arguments(batch: Req, config: CallConfig) -> dict[str, Any]:
    """What differs from the call's own defaults, under the names that the call has; the validation knows them all."""
    call = config.call
    asked = {name: v for n in NAMES if (v := getattr(batch, n)) is not None and (name := config.name_of(n))}
    asked |= batch.extra
    given = {name: as_declared(call[name], value) for name, value in asked.items()}
    given = {name: value for name, value in given.items() if not _same(call[name].default, value)}
    if isinstance(given.get("image"), list) and len(given["image"]) == 1:
        given["image"] = given["image"][0]
    if "frame_rate" in given and isinstance(call["frame_rate"].default, float):
        given["frame_rate"] = float(given["frame_rate"])
    more = next((n for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in call), None)
    count, times = len(batch.prompts), 1 if more else batch.num_images
    texts = {*NAMES["prompt"], *NAMES["negative_prompt"]}
    for name in [n for n in given if n in texts or _ENCODED.fullmatch(n)]:  # of one kind all, as calls want them
        values = given[name] if isinstance(given[name], list | tuple) else [given[name]] * count
        values = [value for value in values for _ in range(times)]
        given[name] = values[0] if len(values) == 1 else values
    if batch.num_images > 1 and more:
        given[more] = batch.num_images
    if "prompt" not in call and "batch_size" in call:
        given["batch_size"] = batch.batch_size
    if "generator" in call:
        made = batch.generator or []
        given["generator"] = made[0] if len(made) == 1 else made
    if "output_type" in call:
        given["output_type"] = "pt"
    return given


def _same(default: Any, value: Any) -> bool:
    return type(default) is type(value) and isinstance(value, int | float | str) and bool(default == value)
