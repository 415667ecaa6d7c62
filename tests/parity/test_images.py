"""Metrics equal those of scikit-image; pictures of nothing are told from pictures at every size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from parity.images import Metrics, difference, emptiness, levels, measure, neighbours, repeated, ssim


def waves(height: int, width: int, pace: float = 1.0) -> Tensor:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    lines = [0.5 + 0.5 * np.sin(x * (0.11 + 0.05 * c) * pace + y * 0.07 * (c + 1) + c) for c in range(3)]
    return torch.from_numpy(np.stack(lines))


def pair(kind: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    a = waves(height, width)
    y, x = np.mgrid[0:height, 0:width]
    grain = torch.from_numpy(0.05 * (((x * 7 + y * 13) % 11) / 5 - 1))
    changed = {"shift": a.roll(1, -1), "dark": a * 0.9, "grain": (a + grain).clamp(0, 1)}
    return a, changed[kind] if kind in changed else waves(height, width, 1.7)


# scikit-image 0.26.0: peak_signal_noise_ratio(a, b, data_range=1) and structural_similarity(a, b, data_range=1,
# gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0)
KNOWN = [
    ("shift", 11, 11, 15.895585035288809, 0.9489647328278726),
    ("shift", 24, 40, 19.696591150184897, 0.938096568571604),
    ("dark", 64, 64, 24.27798682905198, 0.989614799731859),
    ("grain", 11, 11, 30.46130507139157, 0.9453273064590948),
    ("grain", 64, 64, 30.473628097328955, 0.9265660327842523),
    ("other", 24, 40, 5.605798556926951, -0.10896966550476428),
    ("other", 64, 64, 5.9154105978496, -0.023699694897943855),
]


@pytest.mark.parametrize(("kind", "height", "width", "psnr", "similarity"), KNOWN)
def test_psnr_and_ssim_equal_scikit_images(kind: str, height: int, width: int, psnr: float, similarity: float) -> None:
    a, b = pair(kind, height, width)
    found = measure(a[None], b[None])
    assert found.psnr == pytest.approx(psnr, rel=1e-12) and found.ssim == pytest.approx(similarity, rel=1e-9)


def test_ssim_is_the_published_formula_window_by_window() -> None:
    a, b = (t.numpy() for t in pair("grain", 13, 14))
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for channel in range(3):
        for row in range(3):
            for column in range(4):
                x, y = (t[channel, row : row + 11, column : column + 11] for t in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                both = (weights * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(np.mean(found), rel=1e-10)


def test_measures_of_pictures() -> None:
    a = waves(16, 16)[None].float()
    assert measure(a, a) == Metrics(0.0, 0.0, math.inf, 1.0, 0)
    assert measure(a, a).to_json() == {
        "max_abs": 0.0, "mean_abs": 0.0, "psnr": None, "ssim": 1.0, "changed": 0, "frame": 0,
    }  # fmt: skip
    b = a.clone()
    b[0, 1, 3, 5] = 1 - b[0, 1, 3, 5].round()
    gap = float((a - b).abs().max())
    found = measure(a, b)
    assert found.changed == 1 and found.max_abs == pytest.approx(gap) and found.mean_abs == pytest.approx(gap / 768)
    assert found.psnr == pytest.approx(-10 * math.log10(gap**2 / 768))
    assert math.isnan(measure(a[..., :10, :10], b[..., :10, :10]).ssim)
    with pytest.raises(ValueError, match="pictures of shape"):
        measure(a, b[..., :8])
    broken = a.clone()
    broken[0, 0, 0, 0] = math.nan
    assert measure(a, broken).to_json()["psnr"] is None and measure(a, broken).changed >= 0


def test_of_a_video_the_worst_frame_counts() -> None:
    a = torch.stack([waves(16, 16, 1 + i / 5) for i in range(5)])[None]
    b = a.clone()
    b[0, 1] += 0.01
    b[0, 3] -= 0.05
    found = measure(a, b)
    alone = measure(a[:, 3], b[:, 3])
    assert found.frame == 3 and found.psnr == alone.psnr and found.ssim == alone.ssim
    assert found.changed > measure(a[:, 1], b[:, 1]).changed > 0


def test_difference_pictures_and_levels() -> None:
    a = waves(12, 12)
    b = a.clone()
    b[0, 0, 0] += 0.02
    scaled, largest = difference(a, b)
    assert largest == pytest.approx(0.02) and float(scaled.max()) == 1 and int((scaled > 1e-9).sum()) == 1
    assert difference(a, a)[1] == 0 and not difference(a, a)[0].any()
    found = levels(torch.tensor([0.0, 1.0, 0.4999, 127.6 / 255, -3.0, 7.0, math.nan]))
    assert found.tolist() == [0, 255, 127, 128, 0, 255, 0]


SIZES = (16, 33, 64, 256)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texture(size: int, power: float, seed: int) -> Tensor:
    """A picture whose amplitudes fall with frequency as photographs' do (power 1), in [0, 1]."""
    f = torch.fft.fftfreq(size)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    radius[0, 0] = 1
    waves = torch.fft.fft2(torch.randn(3, size, size, generator=draw(seed))) / radius**power
    waves[:, 0, 0] = 0
    x = torch.fft.ifft2(waves).real
    return (x - x.amin()) / (x.amax() - x.amin())


def ramp(size: int) -> Tensor:
    line = torch.linspace(0, 1, size)
    return ((line[:, None] + line[None]) / 2).expand(3, size, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pictures_are_pictures(size: int, seed: int) -> None:
    shown = [texture(size, 1.0, seed), texture(size, 1.5, seed), ramp(size)]
    shown.append((ramp(size) + 0.05 * torch.randn(3, size, size, generator=draw(seed))).clamp(0, 1))
    disc = ((torch.arange(size)[:, None] - size / 2) ** 2 + (torch.arange(size) - size / 3) ** 2) < (size / 4) ** 2
    shown.append(0.9 - 0.8 * disc.float().expand(3, size, size))
    assert [emptiness(x) for x in shown] == [""] * len(shown)
    assert emptiness(shown[0] * 7 - 3, latent=True) == ""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_is_noise(size: int, seed: int) -> None:
    normal = torch.randn(3, size, size, generator=draw(seed))
    spread = torch.rand(3, size, size, generator=draw(seed))
    shuffled = (
        texture(size, 1.5, seed).flatten(1)[:, torch.randperm(size**2, generator=draw(seed))].reshape(3, size, size)
    )
    nothing = [
        (0.5 + 0.2 * normal).clamp(0, 1),
        spread,
        (spread > 0.5).float(),
        shuffled,
        spread[:1],
        ramp(size) + normal / 2,
    ]
    assert all(emptiness(x).startswith("noise (neighbours correlate by") for x in nothing)
    assert emptiness(torch.randn(16, size // 4, size // 4, generator=draw(seed)), latent=True).startswith("noise")


def test_other_pictures_of_nothing() -> None:
    x = ramp(64).clone()
    cells = ((torch.arange(64)[:, None] // 4 + torch.arange(64) // 4) % 2).float().expand(3, 64, 64)
    assert emptiness(torch.zeros(3, 64, 64)) == "black"
    assert emptiness(torch.full((3, 64, 64), 0.7)).startswith("flat (standard deviation")
    assert emptiness(torch.full((4, 8, 8), 3.0), latent=True).startswith("flat")
    assert emptiness(cells) == "one tile of 8 x 8 again and again (100% of the variance)"
    assert emptiness((cells + 0.05 * torch.randn(3, 64, 64, generator=draw())).clamp(0, 1)).startswith("one tile of 8")
    x[0, 0, 0], x[1, 1, 1] = math.nan, math.inf
    assert emptiness(x) == "NaN or inf in 2 of 12288 values"
    assert emptiness(torch.rand(3, 3, 3)) == ""  # too small to tell


def test_what_the_detectors_measure() -> None:
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float()
    assert neighbours(checks) == pytest.approx(-1) and neighbours(ramp(64)) > 0.9
    assert math.isnan(neighbours(torch.ones(3, 8, 8)))
    third = torch.rand(3, 6, 6, generator=draw()).repeat(1, 11, 11)
    assert repeated(third[..., :64, :64]) == (6, pytest.approx(1)) and emptiness(third).startswith("one tile of 6 x 6")
    assert repeated(checks) == (2, pytest.approx(1)) and repeated(torch.ones(3, 32, 32))[1] == 0
    half = 0.5**0.5  # as much noise as picture
    mixed = half * (ramp(256) - 0.5) / ramp(256).std() + half * torch.randn(3, 256, 256, generator=draw())
    assert neighbours(mixed) == pytest.approx(0.5, abs=0.02)
