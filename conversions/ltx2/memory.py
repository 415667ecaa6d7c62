"""Activation memory of LTX-2's transformer (2, 2.3, 2.5). Eager, no gradients, fused attention.

B batch · L tokens of the video · A tokens of the sound · T text tokens · d width · a width of the sound's stream
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload

FRAME_RATE = 24  # of the pipelines' calls


def sound_tokens(config: Mapping[str, Any], work: Workload) -> int:
    """Latents of the sound of a video, as the pipelines count them."""
    each = config["audio_hop_length"] * config["audio_scale_factor"] * config["audio_patch_size_t"]
    tokens: int = round(work.frames / FRAME_RATE * config["audio_sampling_rate"] / each)
    return tokens


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the feed-forward's activation of the video.

    Both sides of it (8·B·L·d). Of either stream (7·B·L·d and 7·B·A·a): the block's input, self-attention's input (its
    arguments stay), the results of attention to the text and to the other stream, what was scaled for the latter, the
    sum of all and its normalised copy, which of the video is the feed-forward's input. The text as it came, and
    projected to both widths (2) or scaled in the block (2.3, 2.5).

    Tables of rotary positions live throughout, in float32, one for each sequence: for attention of each stream to
    itself (2·B·(L·d + A·a)) and for that between them (2·B·(L + A)·c, c the width of the latter); half of that where
    `rope_type` is split. How long the sound is follows from the frames and the rate that the pipelines have for
    default.
    """
    video, sound = patches(work, config["patch_size"], config["patch_size_t"]), sound_tokens(config, work)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    wide = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
    numbers = video * width * (7 + 8) + sound * wide * 7
    numbers += video * config["in_channels"] + sound * config["audio_in_channels"]
    text = work.text_tokens
    if config["use_prompt_embeddings"]:
        numbers += text * (2 * config["caption_channels"] + width + wide)
    else:
        scaled = config["cross_attn_mod"] or config["audio_cross_attn_mod"]
        numbers += text * (config["cross_attention_dim"] + config["audio_cross_attention_dim"]) * (2 if scaled else 1)
    turned = video * width + sound * wide + (video + sound) * config["audio_cross_attention_dim"]
    tables = turned * FLOAT * (1 if config["rope_type"] == "split" else 2)
    return int(work.batch * (numbers * work.element + tables))


FORMULAS = {"LTX2VideoTransformer3DModel": forward}
