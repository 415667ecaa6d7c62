"""Faults of the self-test: an edit to a filled candidate, and the modules that must be named for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Edit = Callable[[Any], object]


def at(path: str, change: Callable[[Any], object]) -> Edit:
    """Change one submodule or parameter."""

    def edit(module: Any) -> None:
        parent, _, last = path.rpartition(".")
        change(getattr(module.get_submodule(parent), last))

    edit.__name__ = path
    return edit


def setting(path: str, name: str, value: Any) -> Edit:
    """Give one submodule another setting."""
    return at(path, lambda m: setattr(m, name, value))


def halves(t: Any) -> None:
    t.data = torch.cat(t.data.chunk(2)[::-1])


def zero(t: Any) -> None:
    t.data.zero_()


def ones(t: Any) -> None:
    t.data.fill_(1.0)


def flip(t: Any) -> None:
    t.data = t.data.t().contiguous()


def rounded(t: Any) -> None:
    t.data = t.data.bfloat16().float()


def one_more(t: Any) -> None:
    t.data += 1


def shifted(t: Any) -> None:
    t.data = t.data.roll(1, 0)


def erf(m: Any) -> None:
    m.approximate = "none"


def swapped(block: str, a: str, b: str) -> Edit:
    def edit(module: Any) -> None:
        parent = module.get_submodule(block)
        one, two = getattr(parent, a), getattr(parent, b)
        setattr(parent, a, two)
        setattr(parent, b, one)

    edit.__name__ = f"{block}.{a}-{b}"
    return edit


def nudged(t: Any) -> None:
    t.data *= 1 + 2**-8  # about one step of bfloat16


def every_eps(module: Any) -> None:
    for child in module.modules():
        if isinstance(getattr(child, "eps", None), float):
            child.eps *= 10


# Each fault with the modules that must be named, the reference's and the candidate's, and how far it moves the output.
UNDER, ABOVE = True, False  # the gate of 1e-3: whether whoever compares only the output would let it pass
Fault = tuple[Edit, str, str, bool]


def alike(edit: Edit, path: str, under: bool) -> Fault:
    """Both sides have the module under the same name."""
    return edit, path, path, under


SD3: list[Fault] = [
    (at("transformer_blocks.0.attn.to_q.bias", zero), "joint_blocks.0.x_block.attn.qkv",
     "transformer_blocks.0.attn.to_q", ABOVE),
    (at("transformer_blocks.1.attn.add_k_proj.weight", rounded), "joint_blocks.1.context_block.attn.qkv",
     "transformer_blocks.1.attn.add_k_proj", UNDER),
    (swapped("transformer_blocks.0.attn", "to_k", "to_v"), "joint_blocks.0.x_block.attn.qkv",
     "transformer_blocks.0.attn.to_k, transformer_blocks.0.attn.to_v", ABOVE),
    (at("transformer_blocks.0.norm1.linear.weight", shifted), "joint_blocks.0.x_block.adaLN_modulation.1",
     "transformer_blocks.0.norm1.linear", ABOVE),
    (at("transformer_blocks.0.attn.norm_q.weight", ones), "joint_blocks.0.x_block.attn.ln_q",
     "transformer_blocks.0.attn.norm_q", ABOVE),
    (setting("transformer_blocks.1.attn.norm_k", "eps", 1e-5), "joint_blocks.1.x_block.attn.ln_k",
     "transformer_blocks.1.attn.norm_k", UNDER),
    (at("transformer_blocks.1.ff.net.0", erf), "joint_blocks.1.x_block.mlp.fc1",
     "transformer_blocks.1.ff.net.0", UNDER),
    (at("transformer_blocks.0.attn.to_add_out.weight", flip), "joint_blocks.0.context_block.attn.proj",
     "transformer_blocks.0.attn.to_add_out", ABOVE),
    (at("norm_out.linear.weight", halves), "final_layer.adaLN_modulation.1", "norm_out.linear", ABOVE),
    (setting("norm_out.norm", "eps", 1e-5), "final_layer.adaLN_modulation.1", "norm_out", UNDER),
]  # fmt: skip
Z_IMAGE: list[Fault] = [
    alike(at("layers.1.attention.to_out.0.weight", flip), "layers.1.attention.to_out.0", ABOVE),
    alike(at("layers.0.feed_forward.w2.weight", rounded), "layers.0.feed_forward.w2", UNDER),
    alike(swapped("layers.0.feed_forward", "w1", "w3"), "layers.0.feed_forward.w1", ABOVE),
    alike(setting("layers.1.attention.norm_q", "eps", 1e-6), "layers.1.attention.norm_q", UNDER),
    alike(at("layers.0.attention_norm1.weight", one_more), "layers.0.attention_norm1", ABOVE),
    alike(at("noise_refiner.0.adaLN_modulation.0.bias", shifted), "noise_refiner.0.adaLN_modulation.0", ABOVE),
    alike(at("cap_embedder.1.bias", zero), "cap_embedder.1", ABOVE),
    alike(at("context_refiner.1.ffn_norm2.weight", ones), "context_refiner.1.ffn_norm2", ABOVE),
    alike(setting("rope_embedder", "theta", 10000.0), "noise_refiner.0.attention", ABOVE),  # where its table goes
    alike(at("t_embedder.mlp.0.weight", halves), "t_embedder.mlp.0", ABOVE),
]
FLUX: list[Fault] = [
    (setting("transformer_blocks.0.norm1.norm", "eps", 1e-5), "double_blocks.0.img_mod.lin",
     "transformer_blocks.0.norm1", UNDER),
    (setting("transformer_blocks.1.attn.norm_q", "eps", 1e-5), "double_blocks.1.img_attn.norm.query_norm",
     "transformer_blocks.1.attn.norm_q", UNDER),
    (setting("single_transformer_blocks.1.act_mlp", "approximate", "none"), "single_blocks.1",
     "single_transformer_blocks.1", UNDER),
    (at("single_transformer_blocks.0.attn.to_k.weight", nudged), "single_blocks.0.linear1",
     "single_transformer_blocks.0.attn.to_k", UNDER),
    (at("transformer_blocks.0.attn.to_q.bias", zero), "double_blocks.0.img_attn.qkv",
     "transformer_blocks.0.attn.to_q", ABOVE),
    (at("single_transformer_blocks.2.attn.norm_k.weight", ones), "single_blocks.2.norm.key_norm",
     "single_transformer_blocks.2.attn.norm_k", ABOVE),
    (swapped("transformer_blocks.1.attn", "add_q_proj", "add_k_proj"), "double_blocks.1.txt_attn.qkv",
     "transformer_blocks.1.attn.add_q_proj, transformer_blocks.1.attn.add_k_proj", ABOVE),
    (at("time_text_embed.guidance_embedder.linear_1.bias", zero), "guidance_in.in_layer",
     "time_text_embed.guidance_embedder.linear_1", ABOVE),
    (setting("pos_embed", "theta", 5000), "forward", "the model's own forward", ABOVE),  # its table is no module's
    (every_eps, "double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1", UNDER),
]  # fmt: skip
PAIR: list[Fault] = [
    (setting("layers.1.act", "approximate", "none"), "blocks.1.mlp.1", "layers.1.act", UNDER),
    (setting("layers.2.norm_b", "eps", 1e-5), "blocks.2.norm2", "layers.2.norm_b", UNDER),
    (setting("layers.0.attention.norm_q", "eps", 1e-5), "blocks.0.attn.q_norm", "layers.0.attention.norm_q", UNDER),
    (setting("layers.1.attention", "scale", 0.3), "blocks.1.attn", "layers.1.attention", ABOVE),
    (at("layers.2.scale_shift.weight", halves), "blocks.2.modulation", "layers.2.scale_shift", ABOVE),
    (at("layers.1.attention.to_v.weight", rounded), "blocks.1.attn.qkv", "layers.1.attention.to_v", UNDER),
    (at("layers.0.down.bias", zero), "blocks.0.mlp.2", "layers.0.down", ABOVE),
    (setting("final_norm", "num_groups", 2), "norm", "final_norm", ABOVE),
    (at("layers.0.attention.to_out.weight", flip), "blocks.0.attn.proj", "layers.0.attention.to_out", ABOVE),
    (at("patch.weight", rounded), "embed", "patch", ABOVE),
]
