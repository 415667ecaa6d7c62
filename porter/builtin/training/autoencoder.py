"""Stage 1 of training `builtin:tiny-flux`: a small AutoencoderKL with FLUX.1's structure (no quant convolutions).

Reconstruction is L1 and L2 on pixels plus L1 on their horizontal and vertical differences (crisp edges), with a KL
term that keeps the latents smooth enough to be modelled. Most steps see 32 x 32 crops around the objects, where the
edges are; the last tenth sees whole pictures, because the middle block's attention spans all of what it is given.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import l1_loss

from .scenes import draw, is_held_out, random_scene

LATENT_CHANNELS = 8
KL_WEIGHT = 1e-6
CROP = 32


def build() -> AutoencoderKL:
    """Factor 4 autoencoder; widths are multiples of 32 because the original code's group norms have 32 groups."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def images(count: int, seed: int) -> Tensor:
    """`count` training scenes -> (count, 3, 64, 64) uint8."""
    rng = random.Random(seed)
    drawn: list[NDArray[np.uint8]] = []
    while len(drawn) < count:
        scene = random_scene(rng, rng.choice((1, 2)))
        if not is_held_out(scene):
            drawn.append(draw(scene, rng, loose=True))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def _crops(pixels: Tensor) -> Tensor:
    """One 32 x 32 crop a picture, the busiest of three random ones -> (B, 3, 32, 32)."""
    chosen = []
    for picture in pixels:
        corners = torch.randint(0, CROP + 1, (3, 2)).tolist()
        tries = [picture[:, y : y + CROP, x : x + CROP] for y, x in corners]
        chosen.append(max(tries, key=lambda crop: int((crop != crop[:, :1, :1]).sum())))
    return torch.stack(chosen)


def _round_trip(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    posterior = vae.encode(x).latent_dist
    latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)
    return vae.decode(latents).sample, posterior.mean, posterior.logvar


def train(steps: int, batch: int, seed: int, pixels: Tensor) -> AutoencoderKL:
    """Train on `pixels` (N, 3, 64, 64) uint8; prints one line every 100 steps."""
    torch.manual_seed(seed)
    vae = build()
    with torch.no_grad():  # begin with little noise: at std 1 the decoder learns to ignore the latents
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.03)
    began = time.monotonic()
    for step in range(steps):
        whole = step >= 0.9 * steps
        chosen = pixels[torch.randint(len(pixels), (batch // 2 if whole else batch,))]
        x = to_float(chosen if whole else _crops(chosen))
        with torch.autocast("cpu", torch.bfloat16):
            decoded, mean, logvar = _round_trip(vae, x)
        decoded, mean, logvar = decoded.float(), mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        edges = sum(l1_loss(decoded.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        loss = l1_loss(decoded, x) + (decoded - x).square().mean() + 0.5 * edges + KL_WEIGHT * kl
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49 or step == 0:
            error = float(((decoded.detach() - x) / 2).square().mean())
            print(
                f"autoencoder {step + 1}/{steps} loss {float(loss.detach()):.4f} psnr {-10 * np.log10(error):.1f} dB "
                f"latent std {float(mean.detach().std()):.2f} "
                f"noise {float((0.5 * logvar.detach()).exp().mean()):.3f} "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    return vae.eval()
