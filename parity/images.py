"""Pictures: how far two of them are apart, and whether one shows anything at all.  H, W: pixels or latent positions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang, Bovik, Sheikh and Simoncelli 2004
FLAT = 1e-3  # standard deviation of a picture in [0, 1] that shows nothing
NOISE = 0.35  # correlation of neighbours: noise -0.25 to 0.12, noise over a gradient to 0.23, pictures 0.53 to 1
NOISE_LATENT = 0.25  # the same in latents, whose neighbours share less: of pictures 0.39 to 0.82
PERIODIC = 0.9  # share of the variance that one repeated tile explains
TILE_GAIN = 0.01  # how much more a larger tile must explain to be the better one


@dataclass(frozen=True)
class Metrics:
    """Candidate against reference, values in [0, 1]; of a video, the worst frame.

    Attributes:
        psnr: dB at a peak of 1; infinite for equal pictures.
        ssim: mean structural similarity, 1 for equal pictures; NaN below 11 x 11 pixels.
        changed: pixels whose 8-bit levels differ, in all frames.
        frame: which frame `psnr` and `ssim` are of (the one with the lowest PSNR); 0 of a single picture.
    """

    max_abs: float
    mean_abs: float
    psnr: float
    ssim: float
    changed: int
    frame: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None (PSNR of equal pictures)."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else float(f"{v:.6g}") if k != "changed" else v
            for k, v in asdict(self).items()
        } | {"frame": self.frame}


def frames(images: Tensor) -> Tensor:
    """(B, 3, H, W) pictures or (B, F, 3, H, W) videos -> all frames (N, 3, H, W)."""
    return images.reshape(-1, *images.shape[-3:])


def measure(reference: Tensor, candidate: Tensor) -> Metrics:
    """Compare pictures (B, 3, H, W) or videos (B, F, 3, H, W) of the same shape, values in [0, 1].

    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"pictures of shape {tuple(candidate.shape)}, reference {tuple(reference.shape)}")
    a, b = frames(reference).double(), frames(candidate).double()
    gap = (a - b).abs()
    squared = (gap**2).flatten(1).mean(1)
    worst = int(squared.nan_to_num(nan=math.inf).argmax())
    return Metrics(
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        psnr=_decibel(float(squared[worst])),
        ssim=ssim(a[worst], b[worst]),
        changed=int((levels(a) != levels(b)).any(1).sum()),
        frame=worst,
    )


def _decibel(squared: float) -> float:
    return math.inf if squared == 0 else -10 * math.log10(squared)


def levels(images: Tensor) -> Tensor:
    """Values in [0, 1] -> the nearest of 256 levels, uint8; what is not a number is 0."""
    return (images.double().nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def ssim(reference: Tensor, candidate: Tensor) -> float:
    """Mean structural similarity of two pictures (C, H, W) in [0, 1]: 11 x 11 Gaussian of 1.5, no padding.

    NaN for pictures smaller than the window.
    """
    if min(reference.shape[-2:]) < WINDOW:
        return math.nan
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return conv2d(conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    a, b = (x.double().cpu().unsqueeze(1) for x in (reference, candidate))  # channels as a batch
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, shared = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def difference(reference: Tensor, candidate: Tensor) -> tuple[Tensor, float]:
    """|reference - candidate| scaled so that its largest value is 1, and that value; shapes as given."""
    gap = (reference.double() - candidate.double()).abs()
    largest = float(gap.max())
    return (gap / largest if largest and math.isfinite(largest) else gap).float(), largest


def neighbours(planes: Tensor) -> float:
    """Correlation of neighbours in (..., H, W), over all planes and both directions: 1 smooth, 0 noise, -1 checkered.

    It is the share of the variance that neighbours have in common, so noise over a smooth picture lowers it by the
    noise's own share. NaN where there is nothing to correlate.
    """
    x = planes.double()
    x = x - x.mean((-2, -1), keepdim=True)
    pairs = ((x[..., :, 1:], x[..., :, :-1]), (x[..., 1:, :], x[..., :-1, :]))
    found = [float((a * b).sum() / norm) for a, b in pairs if (norm := float((a**2).sum() * (b**2).sum()) ** 0.5) > 0]
    return sum(found) / len(found) if found else math.nan


def repeated(planes: Tensor) -> tuple[int, float]:
    """The period whose mean tile explains the most of (..., H, W), and its share of the variance.

    Periods: 2 to 32 positions and powers of two, those that fit at least four times.
    """
    x = planes.double().reshape(-1, *planes.shape[-2:])
    x = x - x.mean((-2, -1), keepdim=True)
    best = (0, 0.0)
    most = min(x.shape[-2:]) // 4
    for period in (*range(2, min(most, 32) + 1), *(2**n for n in range(6, most.bit_length()) if 2**n <= most)):
        rows, columns = (n // period * period for n in x.shape[-2:])
        cut = x[:, :rows, :columns]
        tile = cut.reshape(len(x), rows // period, period, columns // period, period).mean((1, 3))
        total = float((cut**2).mean())
        share = float((tile**2).mean()) / total if total else 0.0
        if share > best[1] + TILE_GAIN:
            best = (period, share)
    return best


def emptiness(images: Tensor, *, latent: bool = False) -> str:
    """Why a picture (..., H, W) shows nothing: not finite, black, flat, noise, one repeated tile; empty if it may.

    Args:
        latent: latents before decoding, of any scale, instead of values in [0, 1].
    """
    x = images.detach().double().cpu()
    if not bool(x.isfinite().all()):
        return f"NaN or inf in {int((~x.isfinite()).sum())} of {x.numel()} values"
    spread = float(x.std())
    if spread < (FLAT * max(1e-3, float(x.abs().max())) if latent else FLAT):
        return "black" if float(x.abs().max()) < FLAT and not latent else f"flat (standard deviation {spread:.1e})"
    if min(x.shape[-2:]) < 4:
        return ""  # too few neighbours to tell
    period, share = repeated(x)
    if share > PERIODIC:
        return f"one tile of {period} x {period} again and again ({share:.0%} of the variance)"
    shared = neighbours(x)
    if shared < (NOISE_LATENT if latent else NOISE):
        return f"noise (neighbours correlate by {shared:.2f})"
    return ""
