"""Activation memory of T5 encoders. Eager, no gradients, PyTorch's fused attention (transformers 5).

L tokens · B sequences · h heads · d width of the model · f width of the feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

INDEX = 8  # bytes of a token id or a mask entry


def encode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one encoding with an attention mask, as most pipelines call it.

    The larger of two moments in a block after the first:

    1. attention: the position bias (h·L·L), joined with the mask and made contiguous (twice B·h·L·L, which outgrows all
       else from some 200 tokens on), beside queries, keys, values, their normalised input, the residual and the token
       embeddings (6·B·L·d);
    2. feed-forward with a gate: four tensors of B·L·f inside the hand-written GELU, and four of B·L·d. T5 still holds
       the first block's bias (h·L·L); UMT5 computes one per block.

    Without a mask, as FLUX.1 and Stable Diffusion 3 call it, one of the two joined copies falls away.
    """
    tokens, batch = work.text_tokens, work.batch
    bias = config["num_heads"] * tokens * tokens
    inner = config["num_heads"] * config["d_kv"]
    attention = bias * (1 + 2 * batch) + 3 * batch * tokens * (inner + config["d_model"])
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    shared = 0 if config.get("model_type") == "umt5" else bias
    feed_forward = shared + batch * tokens * ((4 if gated else 2) * config["d_ff"] + 4 * config["d_model"])
    return int(work.element * max(attention, feed_forward) + batch * tokens * (2 * INDEX + tokens))


FORMULAS = {"T5EncoderModel": encode, "UMT5EncoderModel": encode}
