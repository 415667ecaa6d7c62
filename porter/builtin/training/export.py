"""Write the trained networks as FLUX.1's original code stores them: `flux1-tiny.safetensors` and `ae.safetensors`.

Written by hand from the names of black-forest-labs/flux (commit 802fb47) by walking the live modules. It shares
nothing with the conversion recipes, which are tested against these files: were a swap wrong here, the original code,
which loads them strictly, would paint noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Module = Any  # of the live networks; their attributes are the libraries' business


def transformer_state(model: FluxTransformer2DModel) -> State:
    """The transformer under the names and in the packing of `flux.model.Flux`."""
    state: State = {}

    def put(name: str, *layers: Module) -> None:
        """Linear layers stacked on their output rows under one name."""
        state[f"{name}.weight"] = torch.cat([layer.weight for layer in layers])
        state[f"{name}.bias"] = torch.cat([layer.bias for layer in layers])

    def put_norms(name: str, query: Module, key: Module) -> None:
        state[f"{name}.query_norm.scale"] = query.weight
        state[f"{name}.key_norm.scale"] = key.weight

    put("img_in", model.x_embedder)
    put("txt_in", model.context_embedder)
    embed = model.time_text_embed
    for name, mlp in (
        ("time_in", embed.timestep_embedder),
        ("guidance_in", embed.guidance_embedder),
        ("vector_in", embed.text_embedder),
    ):
        put(f"{name}.in_layer", mlp.linear_1)
        put(f"{name}.out_layer", mlp.linear_2)
    for i, block in enumerate(model.transformer_blocks):
        a, at = block.attn, f"double_blocks.{i}"
        put(f"{at}.img_mod.lin", block.norm1.linear)
        put(f"{at}.txt_mod.lin", block.norm1_context.linear)
        put(f"{at}.img_attn.qkv", a.to_q, a.to_k, a.to_v)
        put(f"{at}.txt_attn.qkv", a.add_q_proj, a.add_k_proj, a.add_v_proj)
        put_norms(f"{at}.img_attn.norm", a.norm_q, a.norm_k)
        put_norms(f"{at}.txt_attn.norm", a.norm_added_q, a.norm_added_k)
        put(f"{at}.img_attn.proj", a.to_out[0])
        put(f"{at}.txt_attn.proj", a.to_add_out)
        for side, mlp in (("img", block.ff), ("txt", block.ff_context)):
            put(f"{at}.{side}_mlp.0", mlp.net[0].proj)
            put(f"{at}.{side}_mlp.2", mlp.net[2])
    for i, block in enumerate(model.single_transformer_blocks):
        a, at = block.attn, f"single_blocks.{i}"
        put(f"{at}.modulation.lin", block.norm.linear)
        put(f"{at}.linear1", a.to_q, a.to_k, a.to_v, block.proj_mlp)
        put(f"{at}.linear2", block.proj_out)
        put_norms(f"{at}.norm", a.norm_q, a.norm_k)
    put("final_layer.linear", model.proj_out)
    for part in ("weight", "bias"):  # the original's final modulation answers shift first, then scale
        scale, shift = getattr(model.norm_out.linear, part).chunk(2)
        state[f"final_layer.adaLN_modulation.1.{part}"] = torch.cat([shift, scale])
    return state


def autoencoder_state(model: AutoencoderKL) -> State:
    """The autoencoder under the names of `flux.modules.autoencoder.AutoEncoder`."""
    state: State = {}

    def put(name: str, layer: Module) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = layer.weight, layer.bias

    def put_resnet(name: str, resnet: Module) -> None:
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{layer}", getattr(resnet, layer))
        if resnet.conv_shortcut is not None:
            put(f"{name}.nin_shortcut", resnet.conv_shortcut)

    def put_side(name: str, side: Module) -> None:
        put(f"{name}.conv_in", side.conv_in)
        put(f"{name}.conv_out", side.conv_out)
        put(f"{name}.norm_out", side.conv_norm_out)
        put_resnet(f"{name}.mid.block_1", side.mid_block.resnets[0])
        put_resnet(f"{name}.mid.block_2", side.mid_block.resnets[1])
        attention = side.mid_block.attentions[0]
        put(f"{name}.mid.attn_1.norm", attention.group_norm)
        projections = (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v))
        for letter, layer in (*projections, ("proj_out", attention.to_out[0])):
            put(f"{name}.mid.attn_1.{letter}", layer)
            weight = f"{name}.mid.attn_1.{letter}.weight"
            state[weight] = state[weight][:, :, None, None]  # the original projects with 1 x 1 convolutions

    put_side("encoder", model.encoder)
    put_side("decoder", model.decoder)
    for i, level in enumerate(model.encoder.down_blocks):
        for j, resnet in enumerate(level.resnets):
            put_resnet(f"encoder.down.{i}.block.{j}", resnet)
        if level.downsamplers:
            put(f"encoder.down.{i}.downsample.conv", level.downsamplers[0].conv)
    for i, level in enumerate(reversed(model.decoder.up_blocks)):  # the original counts from the finest level
        for j, resnet in enumerate(level.resnets):
            put_resnet(f"decoder.up.{i}.block.{j}", resnet)
        if level.upsamplers:
            put(f"decoder.up.{i}.upsample.conv", level.upsamplers[0].conv)
    return state


def save(state: State, path: Path) -> None:
    """Save in bfloat16, the precision in which the original ships."""
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in state.items()}
    save_file(tensors, path, metadata={"format": "pt", "modelspec.title": path.stem})
