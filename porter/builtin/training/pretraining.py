"""Before stage 2, the T5 encoder learns to read: what stands where, told from its tokens alone.

A throw-away head asks the encoder's tokens one question for each of the nine places of the picture (which shape, colour
and size is there, or nothing) and one for the background. The image tokens of the transformer later ask the same.
"""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import T5EncoderModel, T5TokenizerFast

from .scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, caption, is_held_out, random_scene
from .text import T5_LENGTH

ANSWERS = (["nothing", *SHAPES], ["nothing", *COLOURS], ["nothing", *SIZES])


class Reader(nn.Module):
    """Learned questions attend to the encoder's tokens; linear heads answer them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(PLACES) + 1, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, len(answers)) for answers in ANSWERS)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(B, T, X) -> shape, colour and size, each (B, 10, answers), for the nine places and the background."""
        asked = self.questions.expand(len(tokens), -1, -1)
        read, _ = self.attention(asked, tokens, tokens, need_weights=False)
        return [head(read) for head in self.heads]


def truth(scene: Scene) -> list[list[int]]:
    """The right answers, as indices into ANSWERS -> 3 x 10."""
    rows = [[0] * (len(PLACES) + 1) for _ in ANSWERS]
    for thing in scene.things:
        place = list(PLACES).index(thing.place)
        for row, answers, answer in zip(rows, ANSWERS, (thing.shape, thing.colour, thing.size), strict=True):
            row[place] = answers.index(answer)
    rows[1][-1] = ANSWERS[1].index(scene.background)
    return rows


def pretrain(t5: T5EncoderModel, tokenizer: T5TokenizerFast, steps: int, batch: int, seed: int) -> None:
    """Train `t5` in place on captions of training scenes; prints the share of captions read without a mistake."""
    torch.manual_seed(seed)
    rng, reader = random.Random(seed), Reader(t5.config.d_model)
    optimiser = torch.optim.AdamW([*t5.parameters(), *reader.parameters()], lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        scenes: list[Scene] = []
        while len(scenes) < batch:
            scene = random_scene(rng, 1 if rng.random() < 0.3 else 2)
            if not is_held_out(scene):
                scenes.append(scene)
        texts = [caption(scene, rng) for scene in scenes]
        ids = tokenizer(texts, padding="max_length", max_length=T5_LENGTH, return_tensors="pt").input_ids
        right = torch.tensor([truth(scene) for scene in scenes])  # (B, 3, 10)
        answers = reader(t5(ids).last_hidden_state)
        loss = torch.stack(
            [cross_entropy(given.flatten(0, 1), right[:, i].flatten()) for i, given in enumerate(answers)]
        ).sum()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([*t5.parameters(), *reader.parameters()], 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            exact = torch.stack([(given.argmax(-1) == right[:, i]).all(-1) for i, given in enumerate(answers)])
            share = float(exact.all(0).float().mean())
            print(
                f"reading {step + 1}/{steps} loss {float(loss.detach()):.3f} "
                f"read exactly {share:.2f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
