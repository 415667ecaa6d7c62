"""A GLM-Image pipeline at tiny size, made with diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

CODES = 128  # prior tokens; the language model's vocabulary begins with them
SPECIAL = ("<|image|>", "<sop>", "<eop>", "<|start|>", "<|end|>", "<|pad|>", "<|unknown|>", "<|user|>")
TEMPLATE = (
    "{% for message in messages %}<|user|>{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> Any:
    """Letters and marks one by one, behind the prior tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*(f"<|code {i}|>" for i in range(CODES)), *SPECIAL, *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>",
        unk_token="<|unknown|>", padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )  # fmt: skip
    assert made.convert_tokens_to_ids("<|start|>") == CODES + 3
    return made


def write_port(folder: Path, **transformer_changes: Any) -> Path:
    """A GlmImagePipeline folder with random weights, away from 0 and 1."""
    import diffusers
    import transformers

    torch.manual_seed(3)
    words = tokenizer()
    glyphs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    language = transformers.GlmImageForConditionalGeneration(
        transformers.GlmImageConfig(
            text_config={
                "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
                "vision_vocab_size": CODES, "rope_parameters": {"rope_type": "default", "mrope_section": (4, 2, 2)},
                "pad_token_id": CODES + 5, "eos_token_id": CODES + 4,
            },
            vision_config={
                "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8,
                "intermediate_size": 32,
            },
            vq_config={"embed_dim": 32, "num_embeddings": CODES, "latent_channels": 32},
            image_token_id=CODES, image_start_token_id=CODES + 3, image_end_token_id=CODES + 4,
        )
    )  # fmt: skip
    shapes = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": CODES,
    }  # fmt: skip
    transformer = diffusers.GlmImageTransformer2DModel(**shapes | transformer_changes)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, sample_size=64,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 2.0],
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    for model in (glyphs, language, transformer, vae):
        _move(model)
    with torch.no_grad():
        language.lm_head.weight.mul_(3)  # the prompt matters
    images = transformers.GlmImageImageProcessor(patch_size=8, merge_size=1)
    diffusers.GlmImagePipeline(
        tokenizer=transformers.ByT5Tokenizer(),
        processor=transformers.GlmImageProcessor(images, words, chat_template=TEMPLATE),
        text_encoder=glyphs, vision_language_encoder=language, vae=vae, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@torch.no_grad()
def _move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
