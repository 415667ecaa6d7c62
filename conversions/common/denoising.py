"""Pieces that the activation formulas of denoisers share: tokens of a workload, and rotary positions in float32."""

from __future__ import annotations

from porter.core.memory import Workload

FLOAT = 4  # bytes of a float32


def patches(work: Workload, size: int = 2, frames: int = 1) -> int:
    """Tokens of one sequence's latents, cut into patches of `size` x `size` positions and `frames` latent frames."""
    return -(-work.latent_frames // frames) * (work.latent_height // size) * (work.latent_width // size)


def rotary(element: int) -> int:
    """Bytes per number of a query that diffusers' `apply_rotary_emb` holds beside it, at its peak.

    `x.float() * cos + rotated.float() * sin` with `rotated` a copy in x's dtype. Its peak is the second product of a
    16-bit x (first product, float32 copy, second product), or the sum of a float32 one (both products, the sum, whose
    copies cost nothing): three float32 and `rotated` either way.
    """
    return 3 * FLOAT + element
