"""Stages 2 and 3 of training `builtin:tiny-flux`: transformer and text encoders together, then guidance distillation.

Stage 2 is rectified flow (x_t = (1 - t) x_0 + t noise, target noise - x_0) at guidance 1 with captions dropped now and
then. Stage 3 teaches the same network to answer in one pass what classifier-free guidance answers in two, for any
guidance scale from 0 (the caption counts little) to 5, as FLUX.1-dev was distilled.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from .autoencoder import LATENT_CHANNELS, to_float
from .scenes import Scene, caption, draw, is_held_out, random_scene
from .text import T5_LENGTH

TEXT_LENGTHS = (T5_LENGTH,) * 8 + (24, 128)  # now and then another padding, so that padding is learnt to be ignored
DROP_CAPTION, DROP_CLIP = 0.12, 0.3
MAX_GUIDANCE = 5.0


class Denoiser(nn.Module):
    """Transformer with its two text encoders; predicts the flow's velocity from noisy packed latents and token ids."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=t5.config.d_model,
            pooled_projection_dim=clip.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )

    def forward(self, x: Tensor, t: Tensor, guidance: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """x: (B, 64, 16) packed latents, t and guidance: (B,), ids: (B, L) -> (B, 64, 16) velocity."""
        side = int(x.shape[1] ** 0.5)
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=guidance,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, x.device, torch.float32),
            return_dict=False,
        )[0]
        return velocity


@dataclass
class Dataset:
    """Scenes with their encoded pictures: `latents` is (N, 64, 16), packed and normalised."""

    scenes: list[Scene]
    latents: Tensor
    scaling_factor: float
    shift_factor: float


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, count: int, seed: int) -> Dataset:
    """Draw `count` training scenes and encode them; scale and shift are measured on the latents."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    latents: list[Tensor] = []
    began = time.monotonic()
    while len(scenes) < count:
        batch: list[tuple[Scene, Tensor]] = []
        while len(batch) < 100:
            scene = random_scene(rng, 1 if rng.random() < 0.4 else 2)
            if not is_held_out(scene):
                batch.append((scene, torch.from_numpy(draw(scene, rng))))
        pixels = torch.stack([p for _, p in batch]).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_float(pixels)).latent_dist.mean
        scenes += [s for s, _ in batch]
        latents.append(mean.float().half())
        if len(scenes) % 10000 == 0:
            print(f"encoded {len(scenes)}/{count} {time.monotonic() - began:.0f} s", flush=True)
    whole = torch.cat(latents).float()
    shift, scale = round(float(whole.mean()), 4), round(1 / float(whole.std()), 4)
    whole = (whole - shift) * scale
    packed = FluxPipeline._pack_latents(whole, *whole.shape)
    return Dataset(scenes, packed.half(), scale, shift)


class Batches:
    """Random batches: latents, CLIP ids and T5 ids, with captions dropped at the rates above."""

    def __init__(self, data: Dataset, clip: CLIPTokenizer, t5: T5TokenizerFast, size: int, seed: int) -> None:
        self.data, self.clip, self.t5, self.size, self.rng = data, clip, t5, size, random.Random(seed)

    def ids(self, captions: list[str], clip_captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids as FluxPipeline makes them -> (B, 32) and (B, length)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_ids = self.clip(clip_captions, max_length=self.clip.model_max_length, **options).input_ids
        return clip_ids, self.t5(captions, max_length=length, **options).input_ids

    def next(self, drop: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.rng.randrange(len(self.data.scenes)) for _ in range(self.size)]
        captions = [caption(self.data.scenes[i], self.rng) for i in rows]
        if drop:
            captions = ["" if self.rng.random() < DROP_CAPTION else c for c in captions]
        clip_captions = ["" if self.rng.random() < DROP_CLIP else c for c in captions]
        clip_ids, t5_ids = self.ids(captions, clip_captions, self.rng.choice(TEXT_LENGTHS))
        return self.data.latents[rows].float(), clip_ids, t5_ids


def _noisy(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw times (logit-normal, one in four uniform) and noise -> x_t (B, S, C), t (B,), target velocity (B, S, C)."""
    logits = torch.sigmoid(torch.randn(len(x0)) * 1.1 + 0.2)
    t = torch.where(torch.rand(len(x0)) < 0.25, torch.rand(len(x0)), logits)
    noise = torch.randn_like(x0)
    mix = t[:, None, None]
    return (1 - mix) * x0 + mix * noise, t, noise - x0


def classifier_free_scale(guidance: Tensor) -> Tensor:
    """The scale of classifier-free guidance that a guidance value stands for: 3.5, FLUX.1's default, is 1.6.

    Taken at its word, 3.5 would bend the outlines of such plain shapes; below 2 the caption begins to be ignored.
    """
    return guidance * (1.6 / 3.5)


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: Denoiser, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        own: list[Tensor] = list(self.model.parameters())
        new: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(own, new, 1 - decay)


def _optimisers(model: Denoiser, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    blocks = (model.transformer.transformer_blocks, model.transformer.single_transformer_blocks)
    names = {id(p) for part in blocks for n, p in part.named_parameters() if p.ndim == 2 and "norm" not in n}
    inside = [p for p in model.parameters() if id(p) in names]
    reader = list(model.t5.parameters())  # has learnt to read already: a fifth of the rate
    known = names | {id(p) for p in reader}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": others, "lr": learning_rate}, {"params": reader, "lr": learning_rate / 5}]
    return [
        torch.optim.Muon(inside, lr=learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: Denoiser,
    batches: Batches,
    steps: int,
    learning_rate: float,
    seed: int,
    *,
    distil: bool = False,
    checkpoint: Callable[[Denoiser, int], None] | None = None,
) -> Denoiser:
    """Run stage 2, or stage 3 with `distil` -> the average; `checkpoint(average, step)` is called every 500 steps."""
    torch.manual_seed(seed)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if distil else None
    average = Average(model, 0.998)
    optimisers = _optimisers(model, learning_rate)
    warm_up = min(200, steps // 10)

    def rate(step: int) -> float:
        """Share of the learning rate: warm-up, a plateau, then straight down over the second half."""
        return min((step + 1) / warm_up, max(0.02, 1 - max(0, step - 0.5 * steps) / (0.5 * steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, rate) for optimiser in optimisers]
    began = time.monotonic()
    losses: list[float] = []
    model.train()
    for step in range(steps):
        x0, clip_ids, t5_ids = batches.next(drop=not distil)
        x, t, target = _noisy(x0)
        guidance = torch.ones(len(x))
        # The plain attention is faster than the fused one for a hundred tokens on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if teacher is not None:
                guidance = torch.rand(len(x)) * MAX_GUIDANCE
                none = [a.expand(len(x), -1) for a in batches.ids([""], [""], t5_ids.shape[1])]
                with torch.no_grad():
                    one = torch.ones(len(x))
                    free = teacher(x, t, one, *none).float()
                    told = teacher(x, t, one, clip_ids, t5_ids).float()
                    target = free + classifier_free_scale(guidance)[:, None, None] * (told - free)
            predicted = model(x, t, guidance, clip_ids, t5_ids)
        loss = (predicted.float() - target).square().mean()
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        for schedule in schedules:
            schedule.step()
        average.update(model, step)
        losses.append(float(loss.detach()))
        if step % 100 == 99 or step == 9:
            name = "distillation" if distil else "flow"
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"{name} {step + 1}/{steps} loss {recent:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if checkpoint and step % 500 == 499:
            checkpoint(average.model, step + 1)
    return average.model
