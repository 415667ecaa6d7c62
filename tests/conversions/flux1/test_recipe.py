"""FLUX.1's recipe against truths it has no part in: original and diffusers' classes, diffusers' converter, a hand's."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from conversions.flux1.recipe import TRANSFORMER
from porter.core.checkpoint import header_bytes, read_bytes, read_header, specs
from porter.core.errors import RecipeError
from porter.core.execute import apply, execute
from porter.core.ops import Drop, PermuteBlocks, Split
from porter.core.recipe import Recipe, compile_recipe
from tests.conversions.headers import differing, fingerprint, original_table, shapes_of, write

HERE = Path(__file__).parent
AXES = {"axes_dims_rope": [2, 2, 4]}


def config(**changes: Any) -> dict[str, Any]:
    """A tiny, lopsided FLUX.1: every size is another number, so that none can stand for another."""
    tiny = {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 5, "out_channels": None,
        "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 3,
        "joint_attention_dim": 7, "pooled_projection_dim": 6, "guidance_embeds": True, "axes_dims_rope": [2, 2, 4],
    }  # fmt: skip
    return {**tiny, **changes}


def real(name: str) -> dict[str, Any]:
    """The config.json of FLUX.1-dev and -schnell."""
    return config(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=name == "dev", axes_dims_rope=[16, 56, 56],
    )  # fmt: skip


def by_hand(source: Mapping[str, np.ndarray], full: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The whole conversion, slowly and without the engine."""
    h, out = full["num_attention_heads"] * full["attention_head_dim"], {}
    for p in ("weight", "bias"):
        out[f"x_embedder.{p}"] = source[f"img_in.{p}"]
        out[f"context_embedder.{p}"] = source[f"txt_in.{p}"]
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            if ours != "guidance" or full["guidance_embeds"]:
                out[f"time_text_embed.{theirs}_embedder.linear_1.{p}"] = source[f"{ours}_in.in_layer.{p}"]
                out[f"time_text_embed.{theirs}_embedder.linear_2.{p}"] = source[f"{ours}_in.out_layer.{p}"]
        for i in range(full["num_layers"]):
            for stream, suffix in (("img", ""), ("txt", "_context")):
                old, new = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
                out[f"{new}.norm1{suffix}.linear.{p}"] = source[f"{old}_mod.lin.{p}"]
                qkv = source[f"{old}_attn.qkv.{p}"]
                names = ("to_q", "to_k", "to_v") if stream == "img" else ("add_q_proj", "add_k_proj", "add_v_proj")
                for k, name in enumerate(names):
                    out[f"{new}.attn.{name}.{p}"] = qkv[k * h : (k + 1) * h]
                last = "to_out.0" if stream == "img" else "to_add_out"
                out[f"{new}.attn.{last}.{p}"] = source[f"{old}_attn.proj.{p}"]
                out[f"{new}.ff{suffix}.net.0.proj.{p}"] = source[f"{old}_mlp.0.{p}"]
                out[f"{new}.ff{suffix}.net.2.{p}"] = source[f"{old}_mlp.2.{p}"]
                norm = "norm_" if stream == "img" else "norm_added_"
                out[f"{new}.attn.{norm}q.weight"] = source[f"{old}_attn.norm.query_norm.scale"]
                out[f"{new}.attn.{norm}k.weight"] = source[f"{old}_attn.norm.key_norm.scale"]
        for i in range(full["num_single_layers"]):
            old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
            fused = source[f"{old}.linear1.{p}"]
            out[f"{new}.attn.to_q.{p}"] = fused[:h]
            out[f"{new}.attn.to_k.{p}"] = fused[h : 2 * h]
            out[f"{new}.attn.to_v.{p}"] = fused[2 * h : 3 * h]
            out[f"{new}.proj_mlp.{p}"] = fused[3 * h :]
            out[f"{new}.proj_out.{p}"] = source[f"{old}.linear2.{p}"]
            out[f"{new}.norm.linear.{p}"] = source[f"{old}.modulation.lin.{p}"]
            out[f"{new}.attn.norm_q.weight"] = source[f"{old}.norm.query_norm.scale"]
            out[f"{new}.attn.norm_k.weight"] = source[f"{old}.norm.key_norm.scale"]
        shift_scale = source[f"final_layer.adaLN_modulation.1.{p}"]
        out[f"norm_out.linear.{p}"] = np.concatenate([shift_scale[h:], shift_scale[:h]])
        out[f"proj_out.{p}"] = source[f"final_layer.linear.{p}"]
    return out


def converted(recipe: Recipe, full: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    path = write(folder / "in.safetensors", fingerprint(shapes_of(TRANSFORMER.source_headers(full))))
    execute(compile_recipe(recipe, full, read_header(path)[0]), folder / "out.safetensors", overwrite=True)
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_source_headers_are_the_original_classes(name: str) -> None:
    about, shapes = original_table(HERE / f"original_{name}.json")
    assert about["commit"] == "802fb4713906133fcbd0d8dc5351620ca4773036"
    assert shapes_of(TRANSFORMER.source_headers(real(name))) == shapes
    assert TRANSFORMER.infer_config(specs(shapes, "BF16"), about["params"]) == {
        **real(name), "out_channels": 64,  # the original says it; diffusers leaves out what equals in_channels
    }  # fmt: skip


@pytest.mark.parametrize(
    "full",
    [
        config(),
        config(guidance_embeds=False, out_channels=4),
        config(num_single_layers=0),
        real("dev"),
        real("schnell"),
    ],
    ids=["tiny", "no-guidance", "no-single", "dev", "schnell"],
)
def test_target_headers_are_diffusers_class(full: dict[str, Any]) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        state = FluxTransformer2DModel.from_config(full).state_dict()
    assert shapes_of(TRANSFORMER.target_headers(full)) == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False, "out_channels": 4}, {"num_layers": 0}], ids=str)
def test_fingerprint_and_way_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    full = config(**changes)
    source = fingerprint(shapes_of(TRANSFORMER.source_headers(full)))
    assert differing(converted(TRANSFORMER, full, tmp_path), by_hand(source, full)) == []
    plan = compile_recipe(TRANSFORMER, full, read_header(tmp_path / "in.safetensors")[0])
    assert plan.exactness == "exact" and plan.coverage.totals["dropped"] == 0
    back = plan.rebind(read_header(tmp_path / "out.safetensors")[0]).inverse()
    execute(back, tmp_path / "back.safetensors")
    restored, original = read_header(tmp_path / "back.safetensors")[0], read_header(tmp_path / "in.safetensors")[0]
    assert restored.keys() == original.keys()
    for name, info in original.items():
        assert (restored[name].shape, read_bytes(restored[name])) == (info.shape, read_bytes(info)), name


def rule(pattern: str) -> Any:
    return next(r for r in TRANSFORMER.rules if r.sources[0] == pattern)


def swapped(pattern: str, *order: int) -> Recipe:
    """The recipe with the targets of one rule in another order."""
    return TRANSFORMER.replace_rule(pattern, targets=tuple(rule(pattern).targets[k] for k in order))


def traded(one: str, other: str) -> Recipe:
    """The recipe with the targets of two rules traded."""
    first, second = rule(one).targets, rule(other).targets
    return TRANSFORMER.replace_rule(one, targets=second).replace_rule(other, targets=first)


QKV, TXT_QKV = (
    "double_blocks.{i:int}.img_attn.qkv.{p:weight|bias}",
    "double_blocks.{i:int}.txt_attn.qkv.{p:weight|bias}",
)
FUSED, FINAL = "single_blocks.{i:int}.linear1.{p:weight|bias}", "final_layer.adaLN_modulation.1.{p:weight|bias}"
MOD = "double_blocks.{i:int}.img_mod.lin.{p:weight|bias}"
NORM = "double_blocks.{i:int}.img_attn.norm.{}_norm.scale"
WRONG_VALUES = {
    "final halves not swapped": TRANSFORMER.replace_rule(FINAL, ops=()),
    "q and k traded": swapped(QKV, 1, 0, 2),
    "k and v of the text traded": swapped(TXT_QKV, 0, 2, 1),
    "q and v of single blocks traded": swapped(FUSED, 2, 1, 0, 3),
    "mlp before q, k, v": swapped(FUSED, 3, 0, 1, 2).replace_rule(FUSED, ops=(Split(("4*h", "h", "h", "h")),)),
    "image and text modulation traded": traded(MOD, MOD.replace("img", "txt")),
    "image and text MLP traded": traded("double_blocks.{i:int}.img_mlp.0.{p:weight|bias}",
                                        "double_blocks.{i:int}.txt_mlp.0.{p:weight|bias}"),
    "query and key norm traded": traded(NORM.replace("{}", "query"), NORM.replace("{}", "key")),
    "time and guidance embedder traded": traded("time_in.in_layer.{p:weight|bias}",
                                                "guidance_in.in_layer.{p:weight|bias}"),
    "modulation halves swapped where they should not be": TRANSFORMER.replace_rule(MOD, ops=(PermuteBlocks((1, 0)),)),
    "blocks in reverse": TRANSFORMER.replace_rule(MOD, targets="transformer_blocks.{n-1-i}.norm1.linear.{p}"),
    "a third split of the halves": TRANSFORMER.replace_rule(FINAL, ops=(PermuteBlocks((1, 2, 0)),)),
}  # fmt: skip
NOT_ACCOUNTED = {
    "bias rule missing": TRANSFORMER.replace_rule(QKV, sources=QKV.replace("weight|bias", "weight")),
    "split of wrong sizes": TRANSFORMER.replace_rule(FUSED, ops=(Split(("h", "h", "2*h", "3*h")),)),
    "equal split of unequal parts": TRANSFORMER.replace_rule(FUSED, ops=(Split(("7*h//4",) * 4),)),
    "qkv not split": TRANSFORMER.replace_rule(QKV, ops=()),
    "rule missing": TRANSFORMER.without_rule(MOD),
    "v dropped": TRANSFORMER.replace_rule(QKV, targets=rule(QKV).targets[:2]),
    "text stream into the image's tensors": TRANSFORMER.replace_rule(TXT_QKV, targets=rule(QKV).targets),
    "wrong block name": TRANSFORMER.replace_rule(MOD, targets="transformer_block.{i}.norm1.linear.{p}"),
    "index off by one": TRANSFORMER.replace_rule(MOD, targets="transformer_blocks.{i+1}.norm1.linear.{p}"),
    "dropped and missed": TRANSFORMER.replace_rule(MOD, targets=(), ops=(Drop("no reason"),)),
    "unanchored name": TRANSFORMER.replace_rule(MOD, sources="img_mod.lin.{p:weight|bias}", targets="x.{p}"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_VALUES)
def test_planted_fault_is_seen_by_the_fingerprint(tmp_path: Path, fault: str) -> None:
    full = config()
    source = fingerprint(shapes_of(TRANSFORMER.source_headers(full)))
    assert differing(converted(WRONG_VALUES[fault], full, tmp_path), by_hand(source, full))


@pytest.mark.parametrize("fault", NOT_ACCOUNTED)
def test_planted_fault_does_not_compile(fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compile_recipe(NOT_ACCOUNTED[fault], config(), TRANSFORMER.source_headers(config(), "F32"))
    assert caught.value.hint


def random_checkpoint(path: Path, full: Mapping[str, Any], dtype: str) -> Path:
    """A file of the original layout with random bits, written in slices."""
    random, header = np.random.default_rng(7), TRANSFORMER.source_headers(full, dtype)
    block = random.bytes(1 << 24)
    with path.open("wb") as stream:
        stream.write(header_bytes(header.values(), {}))
        for number, info in enumerate(header.values()):
            left, at = info.nbytes, (number * 7919) % 4096
            while left:  # each stretch starts elsewhere in the block, so no two tensors are alike
                part = block[at : at + left]
                stream.write(part)
                left, at = left - len(part), (at + 65_537) % 1_048_576
    return path


def compare_with_diffusers(path: Path, full: Mapping[str, Any], folder: Path) -> int:
    """Bit for bit against diffusers' own converter -> the number of tensors compared."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    execute(compile_recipe(TRANSFORMER, full, read_header(path)[0]), folder / "ours.safetensors")
    ours, theirs = load_torch(folder / "ours.safetensors"), load_torch(path)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(theirs)
    assert ours.keys() == theirs.keys()
    for name in list(ours):
        mine, other = ours.pop(name), theirs.pop(name)
        assert mine.shape == other.shape and mine.dtype == other.dtype, name
        assert torch.equal(mine.view(torch.uint8), other.contiguous().view(torch.uint8)), name
    return len(TRANSFORMER.target_headers(full))


FILL = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}


@pytest.mark.parametrize(
    ("dtype", "more", "count"),
    [
        ("F8_E4M3", {}, 66),
        ("F8_E4M3", {"guidance_embeds": False}, 62),
        pytest.param("F8_E4M3", FILL, 66, marks=pytest.mark.slow),
        pytest.param("BF16", {}, 66, marks=pytest.mark.slow),
    ],
    ids=["dev", "schnell", "fill", "dev-BF16"],
)
def test_equal_to_diffusers_converter_at_its_width(
    tmp_path: Path, dtype: str, more: dict[str, Any], count: int
) -> None:
    """Its width, 3072, is hard-coded: one double and one single block. A byte an element moves like two."""
    full = {**real("dev"), "num_layers": 1, "num_single_layers": 1, **more}
    path = random_checkpoint(tmp_path / "in.safetensors", full, dtype)
    assert compare_with_diffusers(path, full, tmp_path) == count
    for file in tmp_path.iterdir():
        file.unlink()  # a gigabyte or two


def test_the_real_size_compiles_in_a_blink(tmp_path: Path) -> None:
    """A sparse file with FLUX.1-dev's true header: 23.8 GB by its length, a few kB on disk."""
    header = TRANSFORMER.source_headers(real("dev"), "BF16")
    head = header_bytes(header.values(), {})
    path = tmp_path / "flux1-dev.safetensors"
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + sum(info.nbytes for info in header.values()))
    started = time.perf_counter()
    found, _ = read_header(path)
    full = TRANSFORMER.infer_config(found, {"axes_dims_rope": [16, 56, 56]})
    plan = compile_recipe(TRANSFORMER, full, found)
    document = plan.coverage.to_json()
    seconds = time.perf_counter() - started
    assert document["totals"] == {
        "source": 780, "target": 1160, "dropped": 0, "bytes_in": 23_802_816_640, "bytes_out": 23_802_816_640,
    }  # fmt: skip
    assert full == real("dev") and plan.peak_buffer <= 32 << 20
    assert seconds < 0.5, f"{seconds:.3f} s"


def test_embedded_model(tiny_flux: Path, tmp_path: Path) -> None:
    given = json.loads((tiny_flux / "transformer" / "config.json").read_text())
    header, _ = read_header(tiny_flux / "flux1-tiny.safetensors")
    full = TRANSFORMER.infer_config(header, given)
    assert full == given, "its config.json already says everything"
    plan = compile_recipe(TRANSFORMER, full, header)
    execute(plan, tmp_path / "out.safetensors")
    in_memory = apply(plan, load_torch(tiny_flux / "flux1-tiny.safetensors"))
    on_disk = load_torch(tmp_path / "out.safetensors")
    assert list(in_memory) == list(plan.targets) and in_memory.keys() == on_disk.keys()
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in on_disk)

    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(full)
    assert model.load_state_dict(on_disk, strict=True, assign=True).missing_keys == []


def inferred(
    given: Mapping[str, Any], full: Mapping[str, Any] | None = None, **tensors: tuple[int, ...]
) -> dict[str, Any]:
    return TRANSFORMER.infer_config(TRANSFORMER.source_headers(full or config(), "F32"), given)


def test_config_is_read_off_the_tensors() -> None:
    assert inferred(AXES) == config()
    other = config(guidance_embeds=False, out_channels=4, num_single_layers=0)
    assert inferred(AXES, other) == other
    only_single = config(num_layers=0)
    assert inferred(AXES, only_single) == only_single
    kept = config(_diffusers_version="0.36.0", out_channels=5)
    assert inferred(kept) == kept
    originals = {"hidden_size": 24, "num_heads": 3, "depth": 2, "depth_single_blocks": 3, "vec_in_dim": 6,
                 "context_in_dim": 7, "guidance_embed": True, "axes_dim": [2, 2, 4], "theta": 10_000, "mlp_ratio": 4.0,
                 "qkv_bias": True, "in_channels": 5}  # fmt: skip
    assert inferred(originals) == config()


def test_axes_are_never_guessed() -> None:
    with pytest.raises(RecipeError, match="axes_dims_rope") as caught:
        inferred({})
    assert "--config" in (caught.value.hint or "")
    # A config.json of the class without the key means the class's own value, which fits heads of 128 only.
    with pytest.raises(RecipeError, match="axes_dims_rope does not fit"):
        inferred({"_class_name": "FluxTransformer2DModel"})
    assert inferred({"_class_name": "FluxTransformer2DModel"}, real("dev"))["axes_dims_rope"] == [16, 56, 56]
    for axes in ([2, 2, 2], [1, 3, 4], [8], [2, 2, "4"], "224", [0, 4, 4]):
        with pytest.raises(RecipeError, match="axes_dims_rope does not fit"):
            inferred({"axes_dims_rope": axes})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_layers": 19}, ("num_layers", "2 (from the tensors)", "19 (from the config)")),
        ({"guidance_embeds": False}, ("guidance_embeds", "True", "False")),
        ({"in_channels": 6}, ("in_channels", "5", "6")),
        ({"attention_head_dim": 12}, ("attention_head_dim", "8", "12")),
        ({"depth": 3}, ("num_layers", "2", "3")),
        ({"hidden_size": 32}, ("hidden_size", "24", "32")),
        ({"patch_size": 2}, ("patch_size", "1", "2")),
        ({"theta": 2000}, ("theta", "10000", "2000")),
        ({"mlp_ratio": 3.0}, ("mlp_ratio", "4", "3.0")),
        ({"qkv_bias": False}, ("qkv_bias", "True", "False")),
        ({"colour": 1}, ("colour", "num_layers", "1")),
        ({"_class_name": "WanTransformer3DModel"}, ("Wan", "FluxTransformer2DModel", "Wan")),
        ({"num_layers": 2, "depth": 3}, ("num_layers twice", "2", "depth: 3")),
    ],
    ids=str,
)
def test_config_that_contradicts_is_refused_by_name(given: dict[str, Any], words: tuple[str, str, str]) -> None:
    with pytest.raises(RecipeError) as caught:
        inferred({**AXES, **given})
    error = caught.value
    assert words[0] in error.what and words[1] in str(error.expected) and words[2] in str(error.found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("img_in.weight"), "the tensor img_in.weight is missing"),
        (lambda t: t.pop("single_blocks.1.linear2.bias"), "missing from the source: single_blocks.1.linear2.bias"),
        (lambda t: t.update({"extra.weight": (2, 2)}), "no rule claims the source tensor: extra.weight"),
        (lambda t: t.update({"single_blocks.1.linear1.weight": (3, 3)}),
         "wrong shape in the source: single_blocks.1.linear1.weight"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("double_blocks.0.")], "double_blocks.0 is missing"),
        (lambda t: [t.pop(n) for n in list(t) if "guidance_in.out" in n],
         "missing from the source: guidance_in.out_layer"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(change: Any, words: str) -> None:
    shapes = shapes_of(TRANSFORMER.source_headers(config()))
    change(shapes)
    header = specs(shapes, "F32")
    with pytest.raises(RecipeError) as caught:
        compile_recipe(TRANSFORMER, TRANSFORMER.infer_config(header, AXES), header)
    assert words in caught.value.what


def test_module_map_names_the_counterparts() -> None:
    plan = compile_recipe(TRANSFORMER, config(), TRANSFORMER.source_headers(config(), "F32"))
    pairs = {(p.source, p.target): p.source_rows for p in plan.module_map()}
    assert pairs["double_blocks.1.img_attn.qkv", "transformer_blocks.1.attn.to_k"] == (24, 48)
    assert pairs["single_blocks.2.linear1", "single_transformer_blocks.2.proj_mlp"] == (72, 168)
    assert pairs["img_in", "x_embedder"] is None
