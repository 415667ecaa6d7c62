"""A Z-Image pipeline folder at tiny size, made with diffusers', transformers' and tokenizers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from runtime.loader import quiet_libraries
from tests.conversions.z_image.test_model import TINY

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["a red circle and a blue square", "two green triangles on a white background", "user assistant"]


def write_port(folder: Path, *, shift: float = 6.0, dynamic: bool = False) -> Path:
    """A ZImagePipeline folder with random weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(7)
    words = tokenizer()
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words), hidden_size=TINY["cap_feat_dim"], intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=12, max_position_embeddings=256,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(**TINY | {"in_channels": 4})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=0.7,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for model in (encoder, transformer, vae):  # away from 0 and 1, so that nothing is trivially equal
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": vae, "text_encoder": encoder, "tokenizer": words}
    with quiet_libraries():
        ZImagePipeline(transformer=transformer, **parts).save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Bytes, and what a few words are joined to; a chat template that shows each of its settings."""
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    words = Qwen2Tokenizer(
        vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]], eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL, model_max_length=256,
    )  # fmt: skip
    words.chat_template = TEMPLATE
    return words
