"""Activation memory of decoder-only language models that encode a prompt. Eager, no gradients.

L tokens · B sequences · d width of the model · f width of the feed-forward · n layers · v vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from porter.core.memory import Workload

INDEX = 8  # bytes of a token id or a mask entry
Text = Mapping[str, Any]


def encode(config: Text, work: Workload, *, logits: bool = False, fused_gate: bool = False) -> int:
    """Bytes at the peak of one forward, with every layer's output (`output_hidden_states=True`) or without.

    Held for all layers: with hidden states every layer's input ((n + 1)·B·L·d), without them the embeddings, this
    layer's input and the rotary positions (3·B·L·d); and, unless the config or the call says `use_cache=False`, the
    keys and values that would serve the next token. On top of that, the larger of two moments:

    1. the last layer's feed-forward: the sum after attention and its normalised copy, the gate's activation, the other
       half and their product (3·B·L·f; 4 where one projection makes both halves and cannot be freed in part);
    2. `logits`: the language model's head, of which pipelines use nothing: B·L·v.
    """
    text = config.get("text_config") or config
    layers, width, heads = text["num_hidden_layers"], text["hidden_size"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    cache = (
        2 * layers * (text.get("num_key_value_heads") or heads) * head
        if work.text_cache and text.get("use_cache", True)
        else 0
    )
    inside = width + (4 if fused_gate else 3) * text["intermediate_size"]
    last = max(inside, text["vocab_size"] if logits else 0)
    values = (layers + 1 if work.hidden_states else 3) * width + cache + last
    indices = INDEX * (2 if work.text_mask else 1)
    return int(work.batch * work.text_tokens * (values * work.element + indices + work.text_tokens))


FORMULAS = {
    "LlamaModel": encode,
    "MistralModel": encode,
    "Qwen2Model": encode,
    "Qwen3Model": encode,
    "Gemma2Model": encode,
    "GlmModel": partial(encode, fused_gate=True),
    "LlamaForCausalLM": partial(encode, logits=True),
    "Qwen3ForCausalLM": partial(encode, logits=True),
    "Qwen2_5_VLForConditionalGeneration": partial(encode, logits=True),
    "Qwen3VLForConditionalGeneration": partial(encode, logits=True),
    "Gemma3ForConditionalGeneration": partial(encode, logits=True),
    "Mistral3ForConditionalGeneration": partial(encode, logits=True),
}
