"""What the source text of a diffusers pipeline says of its call: sizes, its latents, and how it asks text encoders.

Only text is searched, with patterns; nothing is imported or run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# How an encoder is asked where its pipeline has several and one loop asks those without a call of their own.
OTHERS = ""
_ENCODER = re.compile(rb"(?<!\w)(self\.)?(text_encoder\w*)\(")
_MASK = re.compile(rb"attention_mask=(?!\s*None\b)|\bmask\b|\*\*")
# A mask that the pipeline makes only for an encoder whose config asks for it; none of the released ones does.
_RARE_MASK = re.compile(rb"use_attention_mask.*?attention_mask = None", re.DOTALL)
# `self.vae_scale_factor_spatial = self.vae.config.… if getattr(self, "vae", None) else 8`, also over several lines.
_FACTOR = re.compile(
    rb"^        self\.vae_(\w+) = (?:(\d{1,3})$|\(?[^=]*?\belse (\d{1,3})\b)", re.MULTILINE
)  # fmt: skip
_SAMPLE = re.compile(
    rb"^        self\.default_sample_size = \(\s+self\.\w+\.config\.sample_size\s[^=]*?else (\d{1,4})\s", re.MULTILINE
)
_TOKENS = re.compile(rb"^        self\.tokenizer_max_length = (\d{2,5})$", re.MULTILINE)
_SIDES = re.compile(rb"^        (height|width) = (?:height|width) or (\d{2,5})$", re.MULTILINE)
_FRAMES = re.compile(rb"^ +if num_frames is None[^\n]*:\n(?: +#[^\n]*\n)* +num_frames = (\d{1,4})$", re.MULTILINE)


def text_calls(source: bytes) -> dict[str, dict[str, bool]]:
    """Component -> what its first call passes, as fields of `Workload`; `OTHERS` for encoders asked under no name.

    `text_mask`: an attention mask. `hidden_states`: `output_hidden_states=True`. `text_cache`: no `use_cache=False`.
    The first call is the one for the prompt, as a user makes it who sets nothing.
    """
    found: dict[str, dict[str, bool]] = {}
    for call in _ENCODER.finditer(source):
        name = call[2].decode() if call[1] else OTHERS
        given = _arguments(source, call.end())
        if name in found or not given.strip():
            continue
        rare = b"attention_mask=attention_mask" in given and _RARE_MASK.search(source) is not None
        found[name] = {
            "text_mask": _MASK.search(given) is not None and not rare,
            "hidden_states": b"output_hidden_states=True" in given,
            "text_cache": b"use_cache=False" not in given,
        }
    return found


def numbers(source: bytes) -> Mapping[str, int]:
    """Numbers that stand in a pipeline's source where nobody gives others.

    `spatial`, `temporal`: pixels and frames per latent position without an autoencoder; `frames`: where `num_frames` is
    None; `height`, `width`: where those are None, in pixels; `sample`: the default size in latent positions where the
    denoiser's config names none; `tokens`: what a prompt is padded to where the call takes no length.
    """
    found = {name.decode(): int(size) for name, size in _SIDES.findall(source)}
    for name, plain, other in _FACTOR.findall(source):
        if b"tempor" in name:
            found.setdefault("temporal", int(plain or other))
        elif name in (b"scale_factor", b"scale_factor_spatial", b"spatial_compression_ratio", b"spatial_scale_factor"):
            found.setdefault("spatial", int(plain or other))
    for key, pattern in (("frames", _FRAMES), ("sample", _SAMPLE), ("tokens", _TOKENS)):
        if told := pattern.search(source):
            found[key] = int(told[1])
    return {key: value for key, value in found.items() if value > 0}


def _arguments(source: bytes, start: int) -> bytes:
    """The text up to the parenthesis that closes the one before `start`; empty where none does nearby."""
    depth = 1
    for at in range(start, min(len(source), start + 2000)):
        depth += {40: 1, 41: -1}.get(source[at], 0)
        if not depth:
            return source[start:at]
    return b""
