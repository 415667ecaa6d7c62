"""What parity must know about FLUX.1 beyond the recipes: how each side is called and how its blocks pass activations.

B: images, S: image tokens, T: text tokens, L = T + S (text first), D: model width, N: heads, E: head width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.flux1.model import FluxTransformer
from conversions.flux1.pipeline_case import PIPELINES
from conversions.flux1.recipe import ON_LOAD
from parity.case import Block, Candidate, ComponentCase, Cross, FamilyCases, Named, Shapes
from porter.core.files import read_config
from runtime.loader import load_module

HERE = Path(__file__).parent


# --- the transformer -------------------------------------------------------------------------------------------------


def _arguments(reference: Named) -> dict[str, Tensor]:
    """The original's inputs under diffusers' names; its ids carry a batch axis (B, S, 3), theirs do not."""
    given = {
        "hidden_states": reference["img"],
        "encoder_hidden_states": reference["txt"],
        "pooled_projections": reference["y"],
        "timestep": reference["timesteps"],
        "img_ids": reference["img_ids"][0],
        "txt_ids": reference["txt_ids"][0],
    }
    return given | ({"guidance": reference["guidance"]} if "guidance" in reference else {})


def _heads_first(path: str, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    """The original normalises q and k as (B, N, L, E); both ports as (B, L, N, E)."""
    return tensor.transpose(1, 2) if path.endswith(("query_norm", "key_norm")) else tensor


def _table(cos: Tensor, sin: Tensor, batch: int) -> Tensor:
    """Cosines and sines (L, E / 2) as the original's rotation matrices (B, 1, L, E / 2, 2, 2)."""
    rows = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return rows.expand(batch, 1, *rows.shape)


def _native_in(own: Named, _: Shapes) -> Named:
    batch = own["vec"].shape[0]
    return {**own, "pe": _table(own["rope.0"], own["rope.1"], batch)}


def _original_text(own: Named) -> int:
    return own["encoder_hidden_states"].shape[1]


def _diffusers_in(own: Named, _: Shapes) -> Named:
    cos, sin = own["image_rotary_emb.0"][:, ::2], own["image_rotary_emb.1"][:, ::2]  # each angle stands twice
    return {
        "img": own["hidden_states"],
        "txt": own["encoder_hidden_states"],
        "x": torch.cat([own["encoder_hidden_states"], own["hidden_states"]], 1),
        "vec": own["temb"],
        "pe": _table(cos, sin, own["temb"].shape[0]),
    }


NATIVE = Candidate(
    name="native",
    load=lambda folder: load_native(folder),
    passes={"forward": lambda model, inputs: model(**_arguments(inputs))},
    blocks=(
        Block(
            r"double_blocks\.\d+",
            force=lambda ref, own: {"img": ref["img"], "txt": ref["txt"]},
            inputs=_native_in,
        ),
        Block(r"single_blocks\.\d+", force=lambda ref, own: {"x": ref["x"]}, inputs=_native_in),
    ),
    layout=_heads_first,
    on_load=ON_LOAD,
)

DIFFUSERS = Candidate(
    name="diffusers",
    load=lambda folder: load_diffusers(folder),
    passes={"forward": lambda model, inputs: model(**_arguments(inputs), return_dict=False)[0]},
    blocks=(
        Block(
            r"double_blocks\.\d+",
            force=lambda ref, own: {"hidden_states": ref["img"], "encoder_hidden_states": ref["txt"]},
            inputs=_diffusers_in,
            outputs=lambda own, _: {"0": own["1"], "1": own["0"]},  # diffusers answers text first
        ),
        Block(
            r"single_blocks\.\d+",
            force=lambda ref, own: {
                "hidden_states": ref["x"][:, _original_text(own) :],
                "encoder_hidden_states": ref["x"][:, : _original_text(own)],
            },
            inputs=_diffusers_in,
            outputs=lambda own, _: {"0": torch.cat([own["0"], own["1"]], 1)},
        ),
    ),
    layout=_heads_first,
)


def _native_as_diffusers_in(own: Named, _: Shapes) -> Named:
    pair = {"image_rotary_emb.0": own["rope.0"], "image_rotary_emb.1": own["rope.1"]}
    given = {k: t.repeat_interleave(2, -1) for k, t in pair.items()} | {"temb": own["vec"]}
    return given | ({"hidden_states": own["img"], "encoder_hidden_states": own["txt"]} if "img" in own else {})


def _parted(x: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The joint stream (B, L, D) as diffusers' pair, text first."""
    length = shapes["encoder_hidden_states"][1]
    return {"encoder_hidden_states": x[:, :length], "hidden_states": x[:, length:]}


def _joint(ref: Named) -> Tensor:
    return torch.cat([ref["encoder_hidden_states"], ref["hidden_states"]], 1)


NATIVE_VERSUS_DIFFUSERS = Candidate(
    name="native",
    load=lambda folder: load_native(folder),
    passes={"forward": lambda model, inputs: model(**inputs)},
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            force=lambda ref, own: {"img": ref["hidden_states"], "txt": ref["encoder_hidden_states"]},
            inputs=_native_as_diffusers_in,
            outputs=lambda own, _: {"0": own["1"], "1": own["0"]},
        ),
        Block(
            r"single_transformer_blocks\.\d+",
            force=lambda ref, own: {"x": _joint(ref)},
            inputs=lambda own, shapes: {**_native_as_diffusers_in(own, shapes), **_parted(own["x"], shapes)},
            outputs=lambda own, shapes: dict(zip("01", _parted(own["0"], shapes).values(), strict=True)),
        ),
    ),
    on_load=ON_LOAD,
)


def transformer_inputs(folder: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs by the port's config: two images of 4 x 3 patches, 7 text tokens."""
    config = read_config(folder / "config.json")
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(4, 3, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4.0)[:, None], torch.arange(3.0)[None, :]
    inputs = {
        "hidden_states": torch.randn(2, 12, config["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(2, 7, config["joint_attention_dim"], generator=draw),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=draw),
        "timestep": torch.rand(2, generator=draw),
        "img_ids": ids.reshape(12, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    return {"forward": inputs | ({"guidance": torch.tensor([3.5, 1.75])} if config["guidance_embeds"] else {})}


def load_native(folder: Path) -> nn.Module:
    """The native transformer of a port, float32, filled strictly by the runtime's own loader."""
    return _filled(FluxTransformer, folder)


def load_diffusers(folder: Path) -> nn.Module:
    """diffusers' FluxTransformer2DModel of a port, float32."""
    from diffusers import FluxTransformer2DModel

    return _filled(FluxTransformer2DModel, folder)


def _filled(cls: Any, folder: Path) -> nn.Module:
    """`cls` by its config in `folder`, every parameter filled by exactly one of its tensors, float32."""
    config = read_config(folder / "config.json")
    return load_module(cls, config, folder, dtype=torch.float32, device=torch.device("cpu"))


# --- the autoencoder -------------------------------------------------------------------------------------------------


def load_autoencoder(folder: Path) -> nn.Module:
    """diffusers' AutoencoderKL of a port, float32."""
    from diffusers import AutoencoderKL

    return _filled(AutoencoderKL, folder)


def _encode(model: Any, inputs: Named) -> Tensor:
    """The mean of the latent distribution, normalised; the original does both inside `encode` (sample_z=False)."""
    mean: Tensor = model.encode(inputs["x"]).latent_dist.mode()
    latents: Tensor = (mean - model.config.shift_factor) * model.config.scaling_factor
    return latents


def _decode(model: Any, inputs: Named) -> Tensor:
    """Latents back to pixels; the original denormalises inside `decode`."""
    latents = inputs["z"] / model.config.scaling_factor + model.config.shift_factor
    image: Tensor = model.decode(latents, return_dict=False)[0]
    return image


AUTOENCODER = Candidate(name="diffusers", load=load_autoencoder, passes={"encode": _encode, "decode": _decode})


def _record(component: str) -> Any:
    def command(model: Path, repository: Path, seed: int, out: Path) -> list[str]:
        return [
            *("conversions.flux1.record", "--reference-repo", str(repository.absolute())),
            *("--model", str(model), "--component", component, "--seed", str(seed), "--samples", "0", "-o", str(out)),
        ]

    return command


CASES = FamilyCases(
    components=(
        ComponentCase(
            component="transformer",
            recipe="conversions.flux1.recipe:TRANSFORMER",
            trace=HERE / "reference" / "transformer.safetensors",
            candidates=(NATIVE, DIFFUSERS),
            cross=(
                Cross(
                    DIFFUSERS,
                    NATIVE_VERSUS_DIFFUSERS,
                    call=lambda model, inputs: model(**inputs, return_dict=False)[0],
                    inputs=transformer_inputs,
                    whole=r"(single_)?transformer_blocks\.\d+",
                ),
            ),
            record=_record("transformer"),
        ),
        ComponentCase(
            component="vae",
            recipe="conversions.common.autoencoder_kl.recipe:AUTOENCODER",
            trace=HERE / "reference" / "vae.safetensors",
            candidates=(AUTOENCODER,),
            record=_record("vae"),
            output_step={
                "encode": "normalisation of latents (vae/config.json: scaling_factor, shift_factor)",
                "decode": "denormalisation of latents (vae/config.json: scaling_factor, shift_factor)",
            },
        ),
        ComponentCase(
            component="transformer",
            recipe="conversions.flux1.recipe:TRANSFORMER",
            trace=HERE / "reference" / "transformer-fill.safetensors",
            candidates=(NATIVE, DIFFUSERS),
        ),
    ),
    pipelines=PIPELINES,
    code=("conversions.flux1", "conversions.common", "runtime", "porter.core"),
)
