"""Activation memory of T5 encoders. Eager, no gradients, PyTorch's fused attention (transformers 5).

L tokens · B sequences · h heads · d width of the model · f width of the feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

INDEX, FLOAT32 = 8, 4  # bytes of a token id or a mask entry, and of a float32


def encode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one encoding, with an attention mask or without; hidden states are not asked for.

    The larger of two moments in a block after the first:

    1. attention: the position bias (h·L·L) and its copies: joined with the mask, and made contiguous (twice B·h·L·L,
       which outgrows all else from some 200 tokens on); without a mask, as FLUX.1 and Stable Diffusion 3 call it, only
       one. Beside it queries, keys, values, their normalised input, the residual and the token embeddings (6·B·L·d);
    2. feed-forward with a gate: four tensors of B·L·f inside the hand-written GELU, and four of B·L·d. T5 still holds
       the first block's bias (h·L·L); UMT5 computes one per block.

    Loaded as float16, the feed-forward's last projection stays float32, and so do its input and the residual after it.
    """
    tokens, batch = work.text_tokens, work.batch
    bias = config["num_heads"] * tokens * tokens
    inner = config["num_heads"] * config["d_kv"]
    wide = FLOAT32 if work.dtype == "F16" else work.element
    copies = 2 if work.text_mask else 1
    attention = work.element * (bias * (1 + copies * batch) + batch * tokens * (3 * inner + 2 * config["d_model"]))
    attention += wide * batch * tokens * config["d_model"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    shared = 0 if config.get("model_type") == "umt5" else bias
    inside = (3 if gated else 1) * config["d_ff"] + 2 * config["d_model"]
    feed_forward = work.element * (shared + batch * tokens * inside)
    feed_forward += wide * batch * tokens * (config["d_ff"] + 2 * config["d_model"])
    return int(max(attention, feed_forward) + batch * tokens * (copies * INDEX + tokens))


def kept(config: Mapping[str, Any], work: Workload) -> int:
    """Parameters that stay in float32 after loading in float16: the last projections of the feed-forwards."""
    return int(config["num_layers"] * config["d_ff"] * config["d_model"]) if work.dtype == "F16" else 0


KEPT = {"T5EncoderModel": kept, "UMT5EncoderModel": kept}
FORMULAS = {"T5EncoderModel": encode, "UMT5EncoderModel": encode}
