"""Faults in the recipe itself, planted as a user's own recipe and as the shipped one; parity must fail on each.

When the shipped recipe is wrong, the alignment that parity derives from it is wrong in the same way, so a faulty rule
vouches for its own output. The activations behind it give it away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import conversions.common.autoencoder_kl.recipe as autoencoder
import conversions.flux1.recipe as flux
from conversions.flux1.case import CASES
from parity.outcome import Options, Outcome
from parity.run import run_parity
from porter.core.convert import convert
from porter.core.ops import PermuteBlocks, Split
from porter.core.port import Port
from porter.core.recipe import Recipe

P = "{p:weight|bias}"
QKV, LINEAR1 = "double_blocks.{i:int}.img_attn.qkv." + P, "single_blocks.{i:int}.linear1." + P
FINAL, MOD = "final_layer.adaLN_modulation.1." + P, "single_blocks.{i:int}.modulation.lin." + P
KEYS = "double_blocks.{i:int}.img_attn.norm."
D, S = "transformer_blocks.{i}.attn.", "single_transformer_blocks.{i}."
TEXT = "double_blocks.{i:int}.txt_attn.qkv." + P


def _targets(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}.{{p}}" for name in names)


# what is changed in the recipe -> part of what must be named
FAULTS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "final swap left out": ({FINAL: {"ops": ()}}, "norm_out"),
    "q and k exchanged": ({QKV: {"targets": _targets(D, "to_k", "to_q", "to_v")}}, "transformer_blocks.0.attn"),
    "q and v exchanged": ({QKV: {"targets": _targets(D, "to_v", "to_k", "to_q")}}, "transformer_blocks.0.attn"),
    "text q, k and v rolled": (
        {TEXT: {"targets": _targets(D, "add_k_proj", "add_v_proj", "add_q_proj")}},
        "transformer_blocks.0.attn",
    ),
    "mlp before qkv": (
        {
            LINEAR1: {
                "targets": _targets(S, "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),
                "ops": (Split(("4*h", "h", "h", "h")),),
            }
        },
        "single_transformer_blocks.0",
    ),
    "modulation reordered": ({MOD: {"ops": (PermuteBlocks((1, 0, 2)),)}}, "single_transformer_blocks.0.norm"),
    "query and key norms exchanged": (
        {
            KEYS + "query_norm.scale": {"targets": (D + "norm_k.weight",)},
            KEYS + "key_norm.scale": {"targets": (D + "norm_q.weight",)},
        },
        "transformer_blocks.0.attn",
    ),
    "image and text streams exchanged": (
        {
            "double_blocks.{i:int}.img_mod.lin." + P: {"targets": ("transformer_blocks.{i}.norm1_context.linear.{p}",)},
            "double_blocks.{i:int}.txt_mod.lin." + P: {"targets": ("transformer_blocks.{i}.norm1.linear.{p}",)},
        },
        "transformer_blocks.0.norm1",
    ),
    "timestep and guidance exchanged": (
        {
            "time_in.in_layer." + P: {"targets": ("time_text_embed.guidance_embedder.linear_1.{p}",)},
            "guidance_in.in_layer." + P: {"targets": ("time_text_embed.timestep_embedder.linear_1.{p}",)},
        },
        "time_text_embed",
    ),
}


def broken(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    for pattern, fields in changes.items():
        recipe = recipe.replace_rule(pattern, **fields)
    return recipe


def judge(port: Path, component: str) -> Outcome:
    return run_parity(Port.open(port), "flux1", CASES, Options(components=(component,), against=("trace",)))


@pytest.mark.parametrize(
    "shipped", [pytest.param(False, id="own recipe", marks=pytest.mark.slow), pytest.param(True, id="shipped recipe")]
)
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if i % 4 else ()) for i, fault in enumerate(FAULTS)]
)
def test_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, shipped: bool) -> None:
    changes, named = FAULTS[fault]
    recipe = broken(flux.TRANSFORMER, changes)
    convert("builtin:tiny-flux", tmp_path / "port", component="transformer", recipe={"transformer": recipe})
    if shipped:
        monkeypatch.setattr(flux, "TRANSFORMER", recipe)
    outcome = judge(tmp_path / "port", "transformer")
    assert not outcome.holds and all(r.guilty and named in r.guilty.candidate for r in outcome.components)
    assert outcome.conclusion().startswith("FAIL first guilty module: ")


@pytest.mark.parametrize("shipped", [False, True], ids=["own recipe", "shipped recipe"])
def test_autoencoder_with_q_and_k_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: bool) -> None:
    exchange = {"to_q": "to_k", "to_k": "to_q"}
    changes = {
        rule.sources[0]: {"targets": tuple(t.replace(name, other) for t in rule.targets)}
        for rule in autoencoder.AUTOENCODER.rules
        for name, other in exchange.items()
        if rule.targets and name in rule.targets[0]
    }
    assert len(changes) == 4
    recipe = broken(autoencoder.AUTOENCODER, changes)
    convert("builtin:tiny-flux", tmp_path / "port", component="vae", recipe={"vae": recipe})
    if shipped:
        monkeypatch.setattr(autoencoder, "AUTOENCODER", recipe)
    outcome = judge(tmp_path / "port", "vae")
    assert not outcome.holds and "encoder.mid_block.attentions.0" in outcome.conclusion()
