"""Building blocks that several native models share; parameter names follow diffusers."""

from .embedding import MLPEmbedder, sinusoid
from .feed_forward import FeedForward
from .half import clip_half
from .modulation import AdaLayerNorm, modulate
from .norm import FP32LayerNorm, RMSNorm
from .packed import PackedLinear
from .patches import pack, unpack
from .rotary import apply_rotary, rotary_table
from .rotary_halves import apply_rotary_halves

__all__ = [
    "AdaLayerNorm",
    "FP32LayerNorm",
    "FeedForward",
    "MLPEmbedder",
    "PackedLinear",
    "RMSNorm",
    "apply_rotary",
    "apply_rotary_halves",
    "clip_half",
    "modulate",
    "pack",
    "rotary_table",
    "sinusoid",
    "unpack",
]
