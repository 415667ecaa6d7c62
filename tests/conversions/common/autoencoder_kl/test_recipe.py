"""AutoencoderKL's recipe against truths it has no part in: original classes, diffusers' class and converter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from conversions.common.autoencoder_kl.recipe import AUTOENCODER
from porter.core.checkpoint import read_bytes, read_header, specs
from porter.core.convert import convert
from porter.core.errors import RecipeError
from porter.core.execute import execute
from porter.core.recipe import compile_recipe
from tests.conversions.headers import differing, fingerprint, original_table, shapes_of, write

HERE = Path(__file__).parent
FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def config(**changes: Any) -> dict[str, Any]:
    levels = len(changes.get("block_out_channels", [32, 64, 96]))
    tiny = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 1, "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, **FACTORS,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    }  # fmt: skip
    return {**tiny, **changes}


REAL = config(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16)
VARIANTS = {
    "tiny": config(),
    "flux": REAL,
    "quant convs": config(use_quant_conv=True, use_post_quant_conv=True),
    "no attention": config(mid_block_add_attention=False),
    "one level": config(block_out_channels=[32], layers_per_block=2, in_channels=1, out_channels=2),
    "equal widths": config(block_out_channels=[32, 32]),
    "back and forth": config(block_out_channels=[64, 32, 64], layers_per_block=2),
}


def by_hand(source: Mapping[str, np.ndarray], levels: int) -> dict[str, np.ndarray]:
    """The whole conversion, name by name and without the engine."""
    out = {}
    for name, tensor in source.items():
        parts = name.split(".")
        if parts[1:2] in (["down"], ["up"]):
            block = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
            new = [parts[0], f"{parts[1]}_blocks", str(block)]
            if parts[3] == "block":
                layer = {"nin_shortcut": "conv_shortcut"}.get(parts[5], parts[5])
                new += ["resnets", parts[4], layer, parts[6]]
            else:
                new += [parts[3] + "rs" if parts[3].endswith("e") else parts[3] + "ers", "0", *parts[4:]]
        elif parts[1] == "mid":
            if parts[2] == "attn_1":
                layer = {"norm": "group_norm", "proj_out": "to_out.0"}.get(parts[3], f"to_{parts[3]}")
                new = [parts[0], "mid_block", "attentions", "0", layer, parts[4]]
                if parts[4] == "weight" and parts[3] != "norm":
                    tensor = tensor[:, :, 0, 0]
            else:
                new = [parts[0], "mid_block", "resnets", str(int(parts[2][-1]) - 1), *parts[3:]]
        elif parts[1] == "norm_out":
            new = [parts[0], "conv_norm_out", parts[2]]
        else:
            new = parts
        out[".".join(new)] = tensor
    return out


def test_source_headers_are_the_original_classes() -> None:
    about, shapes = original_table(HERE / "original_flux1_ae.json")
    assert about["commit"] == "802fb4713906133fcbd0d8dc5351620ca4773036"
    assert shapes_of(AUTOENCODER.source_headers(REAL)) == shapes
    assert AUTOENCODER.infer_config(specs(shapes, "F32"), FACTORS) == REAL


@pytest.mark.parametrize("name", VARIANTS)
def test_target_headers_are_diffusers_class(name: str) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        state = AutoencoderKL.from_config(VARIANTS[name]).state_dict()
    assert shapes_of(AUTOENCODER.target_headers(VARIANTS[name])) == {key: tuple(t.shape) for key, t in state.items()}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "flux"])
def test_fingerprint_and_way_back(tmp_path: Path, name: str) -> None:
    full = VARIANTS[name]
    source = fingerprint(shapes_of(AUTOENCODER.source_headers(full)))
    header = read_header(write(tmp_path / "in.safetensors", source))[0]
    assert AUTOENCODER.infer_config(header, FACTORS) == full
    plan = compile_recipe(AUTOENCODER, full, header)
    execute(plan, tmp_path / "out.safetensors")
    wanted = by_hand(source, len(full["block_out_channels"]))
    assert differing(load_file(tmp_path / "out.safetensors"), wanted) == []
    execute(plan.rebind(read_header(tmp_path / "out.safetensors")[0]).inverse(), tmp_path / "back.safetensors")
    restored = read_header(tmp_path / "back.safetensors")[0]
    assert restored.keys() == header.keys()
    for key, info in header.items():
        assert (restored[key].shape, read_bytes(restored[key])) == (info.shape, read_bytes(info)), key


RESNET = "{l:norm1|conv1|norm2|conv2}.{p:weight|bias}"
FAULTS = {
    "up blocks not reversed": AUTOENCODER.replace_rule(
        "decoder.up.{i:int}.block.{j:int}." + RESNET, targets="decoder.up_blocks.{i}.resnets.{j}.{l}.{p}"
    ),
    "attention not squeezed": AUTOENCODER.replace_rule("{e:encoder|decoder}.mid.attn_1.k.weight", ops=()),
    "q and k traded": AUTOENCODER.replace_rule(
        "{e:encoder|decoder}.mid.attn_1.q.weight", targets="{e}.mid_block.attentions.0.to_k.weight"
    ).replace_rule("{e:encoder|decoder}.mid.attn_1.k.weight", targets="{e}.mid_block.attentions.0.to_q.weight"),
    "mid blocks traded": AUTOENCODER.replace_rule(
        "{e:encoder|decoder}.mid.block_{j:int}." + RESNET, targets="{e}.mid_block.resnets.{2-j}.{l}.{p}"
    ),
    "mid blocks off by one": AUTOENCODER.replace_rule(
        "{e:encoder|decoder}.mid.block_{j:int}." + RESNET, targets="{e}.mid_block.resnets.{j}.{l}.{p}"
    ),
    "shortcut missing": AUTOENCODER.without_rule("encoder.down.{i:int}.block.{j:int}.nin_shortcut.{p:weight|bias}"),
    "upsamplers not reversed": AUTOENCODER.replace_rule(
        "decoder.up.{i:int}.upsample.conv.{p:weight|bias}", targets="decoder.up_blocks.{i}.upsamplers.0.conv.{p}"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(tmp_path: Path, fault: str) -> None:
    """At widths where the shapes alone don't tell the blocks apart, wherever that is possible."""
    full = config(block_out_channels=[32, 32, 32]) if "shortcut" not in fault else config()
    source = fingerprint(shapes_of(AUTOENCODER.source_headers(full)))
    header = read_header(write(tmp_path / "in.safetensors", source))[0]
    try:
        plan = compile_recipe(FAULTS[fault], full, header)
    except RecipeError as error:
        assert error.hint
        return
    execute(plan, tmp_path / "out.safetensors")
    assert differing(load_file(tmp_path / "out.safetensors"), by_hand(source, 3))


def test_equal_to_diffusers_converter(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    for name in ("tiny", "quant convs", "back and forth"):
        full = VARIANTS[name]
        path = write(tmp_path / f"{name}.safetensors", fingerprint(shapes_of(AUTOENCODER.source_headers(full))))
        execute(compile_recipe(AUTOENCODER, full, read_header(path)[0]), tmp_path / f"{name}-out.safetensors")
        ours = load_torch(tmp_path / f"{name}-out.safetensors")
        theirs = convert_ldm_vae_checkpoint(load_torch(path), full)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].shape == theirs[key].shape and torch.equal(ours[key], theirs[key]) for key in ours)


def test_embedded_model(tiny_flux: Path, tmp_path: Path) -> None:
    given = json.loads((tiny_flux / "vae" / "config.json").read_text())
    header, _ = read_header(tiny_flux / "ae.safetensors")
    full = AUTOENCODER.infer_config(header, given)
    assert full == given, "its config.json already says everything"
    execute(compile_recipe(AUTOENCODER, full, header), tmp_path / "out.safetensors")
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL.from_config(full)
    assert model.load_state_dict(load_torch(tmp_path / "out.safetensors"), strict=True, assign=True).missing_keys == []


def inferred(given: Mapping[str, Any]) -> dict[str, Any]:
    return AUTOENCODER.infer_config(AUTOENCODER.source_headers(config(), "F32"), given)


def test_scale_and_shift_are_never_guessed() -> None:
    for given, names in (({}, "scaling_factor and shift_factor"), ({"scaling_factor": 0.2}, "shift_factor"),
                         ({"shift_factor": None}, "scaling_factor")):  # fmt: skip
        with pytest.raises(RecipeError, match=names) as caught:
            inferred(given)
        assert "--config" in str(caught.value.hint) and names in str(caught.value.hint)
    assert inferred({"scaling_factor": 0.18, "shift_factor": None})["shift_factor"] is None


def test_a_config_json_that_leaves_them_out_means_the_class_s_own() -> None:
    """Stable Diffusion 1.x's and 2.x's have neither, XL's has no shift."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        own = AutoencoderKL().config
    said = inferred({"_class_name": "AutoencoderKL"})
    assert (said["scaling_factor"], said["shift_factor"]) == (own["scaling_factor"], own["shift_factor"])
    said = inferred({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025})
    assert (said["scaling_factor"], said["shift_factor"]) == (0.13025, None)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"latent_channels": 16}, "latent_channels"),
        ({"block_out_channels": [32, 64]}, "block_out_channels"),
        ({"layers_per_block": 2}, "layers_per_block"),
        ({"norm_num_groups": 16}, "norm_num_groups"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"flavour": 1}, "flavour"),
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
    ],
    ids=str,
)
def test_config_that_contradicts_is_refused_by_name(given: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key) as caught:
        inferred({**FACTORS, **given})
    assert caught.value.expected and caught.value.found


def test_module_map_crosses_the_reversed_blocks() -> None:
    plan = compile_recipe(AUTOENCODER, config(), AUTOENCODER.source_headers(config(), "F32"))
    pairs = {p.source: p.target for p in plan.module_map()}
    assert pairs["decoder.up.0.block.1.conv2"] == "decoder.up_blocks.2.resnets.1.conv2"
    assert pairs["encoder.mid.attn_1.q"] == "encoder.mid_block.attentions.0.to_q"


def test_a_file_of_the_training_loses_its_loss_and_nothing_else(tmp_path: Path) -> None:
    """Recognised in spite of the loss's tensors; each of them is dropped with its reason, and no config names them."""
    loss = {"loss.logvar": (), "loss.discriminator.main.0.weight": (8, 3, 4, 4),
            "loss.perceptual_loss.lin4.model.1.weight": (1, 8, 1, 1)}  # fmt: skip
    loss |= {f"loss.perceptual_loss.net.slice{i}.{i}.bias": (8,) for i in range(1, 6)}
    loss |= {f"loss.perceptual_loss.scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    loss |= {f"loss.discriminator.main.3.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")}
    full = config(use_quant_conv=True, use_post_quant_conv=True)
    kept = shapes_of(AUTOENCODER.source_headers(full))
    write(tmp_path / "vae.safetensors", fingerprint({**kept, **loss}))
    done = convert(tmp_path / "vae.safetensors", tmp_path / "port", config=FACTORS, verify=True)
    assert done.manifest
    dropped = {item["tensor"]: item["reason"] for item in done.manifest["loss"]["dropped"]}
    assert dropped.keys() == loss.keys() and "discriminator" in dropped["loss.discriminator.main.0.weight"]
    assert json.loads((tmp_path / "port" / "vae" / "config.json").read_text()) == full
    odd = write(tmp_path / "odd.safetensors", fingerprint({**kept, **loss, "loss.novel": (2,)}))
    with pytest.raises(RecipeError, match=r"no rule claims the source tensor: loss\.novel"):
        convert(odd, tmp_path / "no", config=FACTORS)
