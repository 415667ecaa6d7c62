"""Activation memory of SkyReels-V2's transformer, which is Wan's. Eager, no gradients, fused attention.

B batch · L tokens of the video · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT
from conversions.wan import memory as wan
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward. With one timestep for the whole video it is Wan's.

    With one for each latent frame (diffusion forcing, and every model with `inject_sample_info`), shifts, scales and
    gates are those of every token: six of them, and the time they come from, live through all blocks (7·B·L·d). The
    larger of two moments:

    1. a block begins: its table and the six are summed in float32, from a float32 copy (2·6·B·L·d; nothing is copied
       in a float32 model), beside the block's input (B·L·d);
    2. it ends: the sum (6·B·L·d in float32), and all that Wan has there.

    All frames are taken at once, as the pipelines do up to `base_num_frames`.

    Raises:
        ValueError: attention in causal blocks of frames, whose mask of L·L would be the peak. No pipeline asks for it
            unless it is told to.
    """
    if config["num_frame_per_block"] > 1:
        raise ValueError("how much the mask of causal blocks takes")
    whole = wan.forward(config, work)
    if not (work.frame_timesteps or config["inject_sample_info"]):
        return whole
    tokens = work.batch * wan.tokens_of(config, work) * wan.width_of(config)
    summed = 6 * tokens * FLOAT
    copied = summed if work.element < FLOAT else 0
    begins = copied + tokens * work.element + wan.given(config, work)
    return 7 * tokens * work.element + summed + max(begins, whole)


FORMULAS = {"SkyReelsV2Transformer3DModel": forward}
