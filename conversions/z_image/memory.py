"""Activation memory of Z-Image's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · S = L + T · d width · f width of the gated feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload

MULTIPLE = 32  # image and text are each padded to a multiple of so many tokens


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the gated feed-forward of a main block.

    Both projections, the activation and their product (4·S·f); the joined sequence, the sum with attention,
    attention's result and the scaled input (4·S·d); image and text apart, which the forward still names (S·d).
    """
    image, text = (-(-n // MULTIPLE) * MULTIPLE for n in (patches(work, config["all_patch_size"][0]), work.text_tokens))
    width = config["dim"]
    inner = int(width / 3 * 8)
    given = work.text_tokens * config["cap_feat_dim"]
    tables = (image + text) * sum(config["axes_dims"]) * 4  # complex numbers of two float32, for half of a head
    return int(work.batch * (work.element * ((image + text) * (4 * inner + 5 * width) + given) + tables))


FORMULAS = {"ZImageTransformer2DModel": forward}
