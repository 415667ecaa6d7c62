"""Wan's prompts: cleaned text through UMT5, padded with zeros.  T: tokens, X: width of a token."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence

from torch import Tensor

from runtime.config import PipelineConfig, TextEncoderSpec
from runtime.request import Req
from runtime.stages import TextEncodingStage
from runtime.stages.text_encoding import TextEmbeddings, module_device

UMT5 = TextEncoderSpec("text_encoder", "tokenizer", max_length=512)


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/tokenizers.py#L12
# Deviation: without ftfy the text is not repaired, as in diffusers; the original does not run without it.
def clean(text: str) -> tuple[str, bool]:
    """Repaired text without HTML's entities and with single blanks, and whether a repair was left out."""
    if repairs := importlib.util.find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    # Twice, for entities of entities.
    text = " ".join(html.unescape(html.unescape(text)).split())
    return text, not repairs and not text.isascii()


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/t5.py#L506
# Deviation: texts are padded here; the original pads in the transformer, to the same length.
class WanTextEncodingStage(TextEncodingStage):
    """Tokens beyond a text's end are zeros, which the transformer sees: all prompts have one length."""

    def encode(self, texts: Sequence[str], batch: Req, config: PipelineConfig) -> TextEmbeddings:
        """One row for each of `texts`: (prompts, T, X)."""
        (spec,) = config.text_encoders
        encoder, tokenizer = self.encoders[spec.encoder], self.tokenizers[spec.tokenizer]
        length = batch.max_sequence_length or spec.max_length
        cleaned = []
        for text in texts:
            text, left = clean(text)
            if left:
                batch.warn("letters beyond ASCII stay as typed, where the original repairs them: pip install ftfy")
            count = len(tokenizer(text, truncation=True, max_length=1 << 20).input_ids)
            if count > length:
                batch.warn(f"{spec.encoder} reads {length} of the prompt's {count} tokens: {text[:40]!r}...")
            cleaned.append(text)
        rows = tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        on = module_device(encoder)
        ids, mask = rows.input_ids.to(on), rows.attention_mask.to(on)  # (prompts, T)
        tokens: Tensor = encoder(ids, mask).last_hidden_state.to(encoder.dtype)  # (prompts, T, X)
        return TextEmbeddings([tokens.masked_fill(mask[..., None] == 0, 0)])
