"""Tokenizers and text encoders of `builtin:tiny-flux`: real CLIP and T5 classes over vocabularies of their own.

The CLIP tokenizer is a byte-pair encoder with CLIP's word ends; the T5 tokenizer is a Unigram model. Both are learnt
from the captions of the scenes and saved as the files that `transformers` loads from a hub repository.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .scenes import caption, random_scene

CLIP_LENGTH = 32
T5_LENGTH = 32


def corpus(count: int, seed: int) -> list[str]:
    """Captions to learn vocabularies from."""
    rng = random.Random(seed)
    return [caption(random_scene(rng, rng.choice((1, 2))), rng) for _ in range(count)]


def clip_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train a CLIP byte-pair tokenizer, save it to `folder` and load it back."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):  # CLIP knows each byte also as the end of a word
        vocabulary.setdefault(symbol + "</w>", len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=CLIP_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(captions: list[str], folder: Path) -> T5TokenizerFast:
    """Build a T5 Unigram tokenizer, save it to `folder` and load it back.

    Every word of the captions is a piece with its log frequency; printable characters spell out the rest.
    """
    words = Counter(word for text in captions for word in text.replace(",", " ,").split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [("\u2581" + word, math.log(n / total)) for word, n in words.most_common() if word != ","]
    pieces += [(chr(code), -12.0 if code != ord(",") else -3.0) for code in range(33, 127)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(
        tokenizer_object=unigram,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=T5_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def clip_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A two-layer CLIP text encoder; its pooled output conditions the transformer's modulation."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5TokenizerFast, seed: int) -> T5EncoderModel:
    """A three-layer T5 v1.1 encoder (gated GELU); its tokens are the transformer's text stream."""
    torch.manual_seed(seed + 1)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
