"""Ports of Qwen-Image's pipelines at tiny size, made with the classes of diffusers, transformers and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runtime.loader import without_videos

WIDTH = 16  # of the language model, and of a text token
PIXELS = 56 * 56  # most pixels of a picture for the language model: four tokens of 28 x 28
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
         "<|image_pad|>", "<|video_pad|>")  # fmt: skip


def write_port(folder: Path, pipeline: str = "QwenImagePipeline", **transformer: Any) -> Path:
    """A pipeline folder with random weights; the autoencoder makes one latent of 8 x 8 pixels.

    `transformer`: further settings of its class.
    """
    import diffusers
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    torch.manual_seed(7)
    parts: dict[str, Any] = {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **transformer,
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.51, -0.23, 0.11, 0.0], latents_std=[1.51, 0.77, 2.03, 1.26],
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=64,
            shift_terminal=0.02, time_shift_type="exponential",
        ),
        "tokenizer": tokenizer(),
    }  # fmt: skip
    parts["text_encoder"] = language_model(parts["tokenizer"])
    if pipeline != "QwenImagePipeline":
        parts["processor"] = processor(parts["tokenizer"])
    with torch.no_grad():
        for name in ("transformer", "vae", "text_encoder"):  # away from 0 and 1, so that nothing is trivially equal
            for parameter in parts[name].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Bytes, and the marks of the templates; the real one joins bytes to longer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, *MARKS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    model = json.loads(made.to_str())["model"]
    found = Qwen2Tokenizer(vocab=model["vocab"], merges=[], extra_special_tokens=list(MARKS[1:]), model_max_length=4096)
    found.padding_side = "right"
    return found


def language_model(words: Any) -> Any:
    """Qwen2.5-VL with two layers each for text and for pictures."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
    )}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": len(words), "max_position_embeddings": 4096,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def processor(words: Any) -> Any:
    """The language model's processor: pictures of at most `PIXELS`."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    sides = {"shortest_edge": 28 * 28, "longest_edge": PIXELS}
    return without_videos(Qwen2VLProcessor)(Qwen2VLImageProcessor(size=sides), words)
