"""What class names and config keys say by themselves: weightless classes, and the entries a reader looks for first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WEIGHTLESS = re.compile(
    r"(Scheduler|Tokenizer(Fast)?|Processor(Fast)?|ImageProcessor\w*|FeatureExtractor|Guider|Guidance|Watermark(er)?)$"
)
# What a reader of a plan looks for first in a config, in this order.
_HIGHLIGHTS = (
    *("num_layers", "num_single_layers", "num_hidden_layers", "num_attention_heads", "num_heads", "attention_head_dim"),
    *("hidden_size", "d_model", "in_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("scaling_factor", "shift_factor", "joint_attention_dim", "cross_attention_dim", "pooled_projection_dim"),
    *("axes_dims_rope", "guidance_embeds", "vocab_size", "max_position_embeddings", "model_max_length"),
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "prediction_type"),
)


def weightless(class_name: str) -> bool:
    """Whether a class of this name holds no weights: schedulers, tokenizers, processors, guiders."""
    return bool(_WEIGHTLESS.search(class_name))


def highlights(config: Mapping[str, Any], limit: int = 8) -> dict[str, Any]:
    """The entries of a config that say most about the architecture."""
    found = {key: config[key] for key in _HIGHLIGHTS if config.get(key) is not None}
    return dict(list(found.items())[:limit])
