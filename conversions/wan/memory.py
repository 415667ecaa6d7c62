"""Activation memory of Wan's transformers. Eager, no gradients, fused attention.

B batch · L tokens of the video · d width · f width of the feed-forward · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward, at the end of a block; the larger of two moments.

    Both have the block's input, the sum with attention, the normalised input of the feed-forward and
    cross-attention's result (4·B·L·d):

    1. the feed-forward's activation: both sides of it (2·B·L·f);
    2. the gated sum, in float32: the feed-forward's result (B·L·d), and in float32 the sum so far, the result and
       their product (3·B·L·d). In a float32 model the copies cost nothing, and the first moment is the larger.
    """
    width = width_of(config)
    copies = 2 if work.element < FLOAT else 0
    activated = work.element * (2 * config["ffn_dim"] + 4 * width)
    gated = width * (5 * work.element + (1 + copies) * FLOAT)
    return int(work.batch * tokens_of(config, work) * max(activated, gated)) + given(config, work)


def vace(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward of VACE, in the video's first block.

    All VACE blocks have run by then. What Wan has at the end of a block, and beside it: a hint from each of them and
    the control tokens as the last one left them (B·L·d each), and the control latents.

    Reference pictures, which the pipeline does not ask for, are a latent frame each, and are not counted.
    """
    kept = (len(config["vace_layers"]) + 1) * width_of(config) * tokens_of(config, work)
    return forward(config, work) + int(work.batch * work.element * (kept + config["vace_in_channels"] * _latents(work)))


def animate(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward of Animate, for one segment of a video; the larger of two moments.

    The reference picture is a latent frame before those of the segment. The embedded pose, which has none for it, and
    the frames of the face live to the end; their copy too, picture after picture, where the batch is above 1.

    1. what Wan has at the end of a block, and what the face's adapter gave after an earlier one (B·L·d);
    2. the motion encoder's first block, in small videos: of `motion_encoder_batch_size` faces at full size its input,
       a convolution of it, that with its bias, activated and scaled, beside the video's tokens (B·L·d).
    """
    segment = replace(work, frames=work.frames + work.temporal)
    width, size = width_of(config), config["motion_encoder_size"]
    video = work.batch * work.element * width * tokens_of(config, segment)
    faces = (2 if work.batch > 1 else 1) * 3 * work.frames * size * size
    pose = width * tokens_of(config, work) + (config["in_channels"] - 4) // 2 * _latents(work)
    # The class's own table halves the channels with every doubling of the size.
    channels = (config["motion_encoder_channel_sizes"] or {}).get(str(size)) or min(512, 16384 // size)
    read = min(config["motion_encoder_batch_size"], work.batch * work.frames)
    encoded = 5 * work.element * read * channels * size * size
    moments = forward(config, segment), encoded + given(config, segment)
    return int(max(moments) + video + work.batch * work.element * (faces + pose))


def width_of(config: Mapping[str, Any]) -> int:
    """d."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def tokens_of(config: Mapping[str, Any], work: Workload) -> int:
    """L."""
    patch = config["patch_size"]
    return int(patches(work, patch[1], patch[0]))


def given(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes that live throughout: latents, the text as given and embedded, rotary tables in float32."""
    text = work.text_tokens * (config["text_dim"] + width_of(config))
    tables = 2 * tokens_of(config, work) * config["attention_head_dim"] * FLOAT
    return int(work.batch * work.element * (text + config["in_channels"] * _latents(work)) + tables)


def _latents(work: Workload) -> int:
    """Positions of one sequence's latents."""
    return work.latent_frames * work.latent_height * work.latent_width


FORMULAS = {
    "WanTransformer3DModel": forward,
    "WanVACETransformer3DModel": vace,
    "WanAnimateTransformer3DModel": animate,
}
