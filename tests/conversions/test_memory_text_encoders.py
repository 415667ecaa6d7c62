"""Memory formulas of text and image encoders against torch's tracker: released configs, called as pipelines do.

The configs are facts from the released models' config files; what stands there as the class default is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from porter.core.memory import Workload, formula_of
from tests.memory_tracker import measure


@dataclass(frozen=True)
class Released:
    """A released encoder; `sizes` are (tokens, batch), the first is checked in every run."""

    name: str
    class_name: str
    config_class: str
    config: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    call: dict[str, Any] = field(default_factory=lambda: {"output_hidden_states": True})
    mask: bool = True

    def whole(self) -> Any:
        """The config object, with the class's defaults."""
        return getattr(transformers, self.config_class)(**self.config)


T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
CLIP_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 1024, "image_size": 224, "patch_size": 14,
}  # fmt: skip
LLAMA = {
    "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
QWEN_VL = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
}  # fmt: skip
GLM = {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
MISTRAL = {
    "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip

PLAIN: dict[str, Any] = {"output_hidden_states": False}
ENCODERS = [
    Released("t5 xxl", "T5EncoderModel", "T5Config", T5, ((512, 1), (77, 2), (226, 1), (300, 2)), PLAIN),
    Released("umt5 xxl", "UMT5EncoderModel", "UMT5Config", T5 | {"vocab_size": 256384}, ((512, 1), (128, 2)), PLAIN),
    Released("clip l", "CLIPTextModel", "CLIPTextConfig", CLIP_L, ((77, 1), (77, 2)), mask=False),
    Released("clip g", "CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_G, ((77, 1), (77, 2)), mask=False),
    Released("clip h", "CLIPVisionModel", "CLIPVisionConfig", CLIP_H, ((0, 1), (0, 2))),
    Released("clip h", "CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIP_H, ((0, 1), (0, 2)), PLAIN),
    Released("hunyuanvideo", "LlamaModel", "LlamaConfig", LLAMA, ((351, 1), (351, 2))),
    Released("hidream", "LlamaForCausalLM", "LlamaConfig", LLAMA, ((128, 1), (128, 2))),
    Released(
        "qwen-image", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {"text_config": QWEN_VL},
        ((546, 1), (100, 2), (1058, 1)),
    ),
    Released(
        "qwen3-vl 8b", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        {"text_config": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}},
        ((256, 1), (512, 2)),
    ),
    Released(
        "ltx2", "Gemma3ForConditionalGeneration", "Gemma3Config", {"text_config": GEMMA3}, ((1024, 1), (256, 2)),
    ),
    Released("z-image", "Qwen3Model", "Qwen3Config", QWEN3, ((512, 1), (120, 2))),
    Released("flux2 klein", "Qwen3ForCausalLM", "Qwen3Config", QWEN3, ((512, 1), (512, 2))),
    Released("lumina2", "Gemma2Model", "Gemma2Config", GEMMA2, ((256, 1), (300, 2), (512, 1))),
    Released("cogview4", "GlmModel", "GlmConfig", GLM, ((224, 1), (64, 2), (1024, 1)), mask=False),
    Released(
        "flux2", "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"text_config": {"model_type": "mistral", **MISTRAL}}, ((512, 1), (128, 2)),
    ),
    # As some pipelines ask: FLUX.1, Stable Diffusion 1.5 and 3, Sana, FLUX.2 without keys and values.
    Released("t5 unmasked", "T5EncoderModel", "T5Config", T5, ((512, 1), (512, 2), (256, 1)), PLAIN, mask=False),
    Released("umt5 unmasked", "UMT5EncoderModel", "UMT5Config", T5, ((512, 1), (128, 2)), PLAIN, mask=False),
    Released("clip l last", "CLIPTextModel", "CLIPTextConfig", CLIP_L, ((77, 1), (77, 2)), PLAIN, mask=False),
    Released("sana", "Gemma2Model", "Gemma2Config", GEMMA2, ((300, 1), (300, 2)), PLAIN),
    Released(
        "no cache", "Qwen3ForCausalLM", "Qwen3Config", QWEN3, ((512, 1),),
        {"output_hidden_states": True, "use_cache": False},
    ),
]  # fmt: skip

# Classes whose formula others check in every run.
ALIKE = ("LlamaForCausalLM", "Qwen3Model", "Qwen3VLForConditionalGeneration", "Gemma3ForConditionalGeneration")


def checks() -> Iterator[Any]:
    for model in ENCODERS:
        for number, (tokens, batch) in enumerate(model.sizes):
            for dtype in ("BF16", "F16", "F32"):
                often = (number, dtype) == (0, "BF16") and (model.class_name not in ALIKE or model.name == "no cache")
                marks = () if often else pytest.mark.slow
                name = f"{model.name} {model.class_name} {batch}x{tokens} {dtype}"
                yield pytest.param(model, tokens, batch, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("model", "tokens", "batch", "dtype"), list(checks()))
def test_encoding_needs_what_the_tracker_sees(model: Released, tokens: int, batch: int, dtype: str) -> None:
    config = model.whole()
    ids = ((batch, tokens), torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids} | ({"attention_mask": ids} if model.mask else {})
    if "Vision" in model.class_name:
        inputs = {"pixel_values": (batch, 3, config.image_size, config.image_size)}
    measured = measure(lambda: getattr(transformers, model.class_name)(config), inputs | model.call, dtype)
    states, cache = model.call["output_hidden_states"], model.call.get("use_cache", True)
    work = Workload(
        dtype, batch=batch, text_tokens=tokens, text_mask=model.mask, hidden_states=states, text_cache=cache
    )
    estimate = formula_of(model.class_name)(config.to_dict(), work)
    assert 0.85 <= estimate / measured.activations <= 1.15, (estimate, measured.activations)
