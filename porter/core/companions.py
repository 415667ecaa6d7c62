"""Tensors that accompany others: scales of quantised weights, LoRA factors. Told by the ends of their names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from porter.core.checkpoint import TensorInfo
from porter.core.gguf import QUANTISED
from porter.core.units import several

# method -> ends of names that only it writes
_ENDS: Mapping[str, re.Pattern[str]] = {
    "fp8 scaled": re.compile(
        r"\.(scale_weight|scale_input|weight_scale|input_scale|weight_scale_inv|scale)$|^scaled_fp8$"
    ),
    "bitsandbytes 4-bit": re.compile(
        r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))$"
    ),
    "bitsandbytes 8-bit": re.compile(r"\.(SCB|weight_format)$"),
    "comfy quantised": re.compile(r"\.comfy_quant$"),
}  # fmt: skip
FACTORS = re.compile(
    r"[._](lora_(?:A|B|down|up|mid)(?:\.\w+)?(?:\.weight)?|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|oft_blocks"
    r"|dora_scale|lora_magnitude_vector(?:\.\w+)?|diff(?:_b)?|alpha)$"
)
AVERAGED = ("model_ema.", "ema.", "ema_model.", "params_ema.")  # before the names of averaged copies of weights
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Companions:
    """A header without what only accompanies its tensors.

    Attributes:
        plain: the tensors that a model's own state dict has.
        quantised: how their data is packed, with the number of tensors; None where it is not.
        factors: how many names are factors of a LoRA or its kin.
    """

    plain: dict[str, TensorInfo]
    quantised: str | None
    factors: int


def part(header: Mapping[str, TensorInfo]) -> Companions:
    """Take a header's companions away, and say what they show."""
    scaled = any(info.dtype in _FP8 for info in header.values())
    counts: Counter[str] = Counter()
    plain: dict[str, TensorInfo] = {}
    for name, info in header.items():
        method = next((m for m, ends in _ENDS.items() if ends.search(name) and (m != "fp8 scaled" or scaled)), None)
        # `.scale` alone is a norm's weight in many models; it is a quantised weight's only beside that weight.
        if method and name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" not in header:
            method = None
        if method:
            counts[method] += 1
        else:
            plain[name] = info
    blocks = Counter(info.dtype for info in plain.values() if info.dtype in QUANTISED)
    words = [f"{method} ({several(count, 'scale')})" for method, count in counts.most_common()]
    words += [f"GGUF {kind} ({several(count, 'tensor')})" for kind, count in blocks.most_common(3)]
    if not words and scaled:
        bare = sum(info.dtype in _FP8 for info in plain.values())
        words = [f"fp8 without scales ({several(bare, 'tensor')})"]
    return Companions(plain, ", ".join(words) or None, sum(bool(FACTORS.search(name)) for name in header))
