"""A LoRA carried through a recipe changes the result as the same change of the whole weights does, for every recipe."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conversions.flux1.recipe import diffusers_headers
from porter.core.checkpoint import specs
from porter.core.errors import BadInputError, PorterError, UsageError
from porter.core.execute import apply
from porter.core.family import families, resolve
from porter.core.lora import read_lora
from porter.core.loratargets import Target, changes, original_plans
from porter.core.lowrank import Delta, Matrix, Term, carry, joined, make
from porter.core.onload import compile_on_load
from porter.core.ops import Concat, Drop, Op, PermuteBlocks, Regroup, Reshape, Split, Transpose
from porter.core.recipe import Recipe, Rule, compile_recipe
from porter.core.tensorplan import TensorPlan
from tests.conversions.proofs import Proof
from tests.conversions.test_recipes import PROOFS

FLUX = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


_seen: Counter[str] = Counter()
TWO = [proof for proof in PROOFS if _seen.update([proof.recipe]) or _seen[proof.recipe] <= 2]  # of each recipe


def dense(change: Delta, factors: Mapping[str, Tensor]) -> Tensor:
    """The whole change of a weight, from its joined factors."""
    pair = joined(change)
    a, b = (make(matrix, factors.__getitem__, torch) for matrix in (pair.a, pair.b))
    scale = torch.zeros(b.shape[1], dtype=b.dtype)
    for span in pair.spans:
        scale[slice(*span.ranks)] = span.scale
    return ((b * scale) @ a.flatten(1)).reshape(change.shape)


def drawn(plan: TensorPlan, seed: int) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """A change, of a rank and scale of its own, of each weight that a plan takes and does not drop."""
    dropped = {n for step in plan.steps if any(isinstance(op, Drop) for op in step.ops) for n in step.sources}
    found, factors = {}, {}
    draw = torch.Generator().manual_seed(seed)
    for number, (name, info) in enumerate(plan.sources.items()):
        if not name.endswith(".weight") or len(info.shape) < 2 or name in dropped:
            continue
        rank, module = 1 + number % 3, name.removesuffix(".weight")
        shapes = {f"{name}.A": (rank, *info.shape[1:]), f"{name}.B": (info.shape[0], rank)}
        for key, shape in shapes.items():  # small integers: every sum is exact
            factors[key] = torch.randint(-4, 5, shape, generator=draw).double()
        a, b = (Matrix(shape, key) for key, shape in shapes.items())
        found[module] = Delta(info.shape, (Term(a, b, (number % 5 + 1) / 4, stem=module),))
    return found, factors


def compare(plan: TensorPlan, found: Mapping[str, Delta], factors: Mapping[str, Tensor]) -> int:
    """Carried changes against the plan's own ops on the whole changes; how many weights change."""
    whole = {name: torch.zeros(info.shape, dtype=torch.float64) for name, info in plan.sources.items()}
    whole |= {f"{module}.weight": dense(change, factors) for module, change in found.items()}
    carried = {f"{module}.weight": change for module, change in carry(found, plan).items()}
    for name, want in apply(plan, whole).items():
        got = dense(carried[name], factors) if name in carried else torch.zeros(want.shape, dtype=torch.float64)
        assert torch.equal(got, want), name
        assert want.any() == (name in carried), name
    return len(carried)


@pytest.mark.parametrize("proof", TWO, ids=lambda proof: proof.name)
def test_a_change_is_carried_as_the_weights_are(proof: Proof) -> None:
    recipe = proof.load()
    plan = compile_recipe(recipe, proof.tiny, recipe.source_headers(proof.tiny))
    found, factors = drawn(plan, 1)
    assert compare(plan, found, factors) >= len(found) > 9
    if plan.exactness == "exact" and not any(step.computed or step.agreements for step in plan.steps):
        back = plan.inverse()  # what was split is joined, of parts with factors of their own
        if not any(step.agreements or step.computed for step in back.steps):
            found, factors = drawn(back, 2)
            assert compare(back, found, factors)
            some = {module: change for number, (module, change) in enumerate(found.items()) if number % 3}
            assert compare(back, some, factors)


@pytest.mark.parametrize(
    "ops",
    [(Concat(), Split((3, 8, 1))), (Concat(), PermuteBlocks((1, 0))), (Concat(), Regroup((2, 6), (1, 0))),
     (Concat(), Transpose()), (Concat(), Transpose(), Split((5, 7), 1)), (Concat(), Reshape((12, 3, 2))),
     (Concat(1), Split((5, 7), 1)), (Concat(1), Split((2, 4))), (Concat(1), PermuteBlocks((2, 0, 1), 1)),
     (Concat(1), Regroup((3, 4), (1, 0), 1)), (Concat(1), Transpose(), Split((9, 3)))],
    ids=lambda ops: " ".join(f"{op.describe()}" for op in ops),
)  # fmt: skip
def test_changes_of_parts_keep_their_places(ops: tuple[Op, ...]) -> None:
    """Ops after a join, which sees several weights of which only some may change."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (6, 6) for name in "ab"}
    count = len(ops[-1].sizes) if isinstance(ops[-1], Split) else 1
    targets = tuple(f"t{number}.weight" for number in range(count))
    recipe = Recipe("toy", "old", "new", (Rule(tuple(shapes), targets, ops),))
    plan = compile_recipe(recipe, {}, specs(shapes))
    found, factors = drawn(plan, 6)
    assert compare(plan, found, factors) == count
    for only in found:
        compare(plan, {only: found[only]}, factors)


def natives() -> dict[str, tuple[Proof, str]]:
    """Recipe that writes a component's usual layout → a proof of it, and the native class that runs the component."""
    parts = [part for family in families().values() for part in family.components if part.native and part.recipe]
    made = {part.recipe: part.native for part in parts}
    return {proof.recipe: (proof, made[proof.recipe]) for proof in PROOFS[::-1] if proof.recipe in made}  # type: ignore[dict-item]


@pytest.mark.parametrize("reference", natives())
def test_a_change_is_packed_as_the_native_models_weights_are(reference: str) -> None:
    proof, native = natives()[reference]
    header = proof.load().target_headers(proof.tiny)
    plan = compile_on_load(resolve(native).on_load, proof.tiny, header)
    found, factors = drawn(plan, 3)
    assert compare(plan, found, factors) < len(found)
    some = {module: change for number, (module, change) in enumerate(found.items()) if number % 3}
    assert compare(plan, some, factors)


def test_what_a_recipe_drops_takes_no_lora() -> None:
    proof = next(proof for proof in PROOFS if proof.name == "open-clip-penultimate")
    recipe = proof.load()
    plan = compile_recipe(recipe, proof.tiny, recipe.source_headers(proof.tiny))
    module = "transformer.resblocks.3.mlp.c_fc"
    shape = plan.sources[f"{module}.weight"].shape
    change = Delta(shape, (Term(Matrix((1, shape[1]), "a"), Matrix((shape[0], 1), "b"), 1.0, stem="lora_te_x"),))
    with pytest.raises(BadInputError, match=r"lora_te_x cannot be carried(.*\n)+.*left out: the last layer"):
        carry({module: change}, plan)


def kohya(names: Mapping[str, tuple[int, int]], alpha: float) -> dict[str, Tensor]:
    """A file as kohya's scripts write it: module -> (outputs, inputs)."""
    draw = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in names.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=draw)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=draw)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def test_equal_to_diffusers_own_converter_at_full_width(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    h, at, single = 3072, "double_blocks.0", "single_blocks.0"
    names = {f"{at}.{stream}_attn.qkv": (3 * h, h) for stream in ("img", "txt")}
    names |= {f"{at}.{stream}_attn.proj": (h, h) for stream in ("img", "txt")}
    names |= {f"{at}.{stream}_mlp.0": (4 * h, h) for stream in ("img", "txt")}
    names |= {f"{at}.img_mlp.2": (h, 4 * h), f"{at}.txt_mod.lin": (6 * h, h), f"{single}.modulation.lin": (3 * h, h)}
    names |= {f"{single}.linear1": (7 * h, h), f"{single}.linear2": (h, 5 * h)}
    tensors = kohya(names, 3.0)
    save_file(tensors, tmp_path / "it.safetensors")
    known = families()["flux1"].component("transformer")
    assert known is not None
    header = diffusers_headers(FLUX)
    target = Target("transformer", "FluxTransformer2DModel", header, original_plans(known, FLUX, header), predicts=True)
    found = changes(read_lora(tmp_path / "it.safetensors"), [target])["transformer"]
    want = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    modules = {key.removeprefix("transformer.").partition(".lora_")[0] for key in want}
    assert set(found) == modules and len(modules) == 18
    for module, change in found.items():
        (term,) = change.terms  # as small as in the file: q, k and v share their A
        assert term.rank == 4 and term.scale == 0.75
        a, b = (make(matrix, tensors.__getitem__, torch) for matrix in (term.a, term.b))
        assert torch.equal(a * 0.75, want[f"transformer.{module}.lora_A.weight"]), module
        assert torch.equal(b, want[f"transformer.{module}.lora_B.weight"]), module


@pytest.mark.parametrize(
    ("name", "converter"),
    [("wan-transformer-t2v", "wan"), ("wan-transformer-i2v", "wan"), ("qwen-image-transformer", "qwen"),
     ("z-image-transformer", "z_image")],
)  # fmt: skip
def test_original_names_as_diffusers_own_converters_read_them(name: str, converter: str, tmp_path: Path) -> None:
    conversion = importlib.import_module("diffusers.loaders.lora_conversion_utils")
    proof = next(proof for proof in PROOFS if proof.name == name)
    recipe = proof.load()
    plan = compile_recipe(recipe, proof.tiny, recipe.source_headers(proof.tiny))
    tensors, draw = {}, torch.Generator().manual_seed(4)
    for key, info in plan.sources.items():
        if key.endswith(".weight") and len(info.shape) == 2:
            stem = "diffusion_model." + key.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(3, info.shape[1], generator=draw)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(info.shape[0], 3, generator=draw)
    save_file(tensors, tmp_path / "it.safetensors")
    target = Target("transformer", "", recipe.target_headers(proof.tiny), (plan,), predicts=True)
    found = changes(read_lora(tmp_path / "it.safetensors"), [target])["transformer"]
    want = getattr(conversion, f"_convert_non_diffusers_{converter}_lora_to_diffusers")(dict(tensors))
    assert {f"transformer.{module}.lora_{end}.weight" for module in found for end in "AB"} == set(want)
    for module, change in found.items():
        for end, matrix in zip("AB", (change.terms[0].a, change.terms[0].b), strict=True):
            got = make(matrix, tensors.__getitem__, torch)
            assert torch.equal(got, want[f"transformer.{module}.lora_{end}.weight"]), module


def lora_of(folder: Path, **shapes: tuple[int, int]) -> Path:
    """A file whose factors change weights of these shapes; `__` in a stem stands for a dot."""
    tensors = {}
    for stem, (rows, columns) in shapes.items():
        tensors[stem.replace("__", ".") + ".lora_down.weight"] = torch.ones(2, columns)
        tensors[stem.replace("__", ".") + ".lora_up.weight"] = torch.ones(rows, 2)
    save_file(tensors, folder / "it.safetensors")
    return folder / "it.safetensors"


FC = {"encoder.layers.0.mlp.fc1.weight": (32, 8)}
ENCODERS = [
    Target(
        "transformer", "T", specs({"proj.weight": (4, 4), "a.b.weight": (4, 4), "a_b.weight": (4, 4)}), predicts=True
    ),
    Target("text_encoder", "CLIPTextModel", specs(FC)),
    Target("text_encoder_2", "B", specs({"text_model.encoder.layers.0.mlp.fc1.weight": (64, 16)})),
    Target("text_encoder_3", "C", specs({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)})),
]
INSIDE = "encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("stem", "shape", "component"),
    [(f"lora_te_text_model_{INSIDE}", (32, 8), "text_encoder"), (f"lora_te1_{INSIDE}", (32, 8), "text_encoder"),
     (f"lora_te2_text_model_{INSIDE}", (64, 16), "text_encoder_2"),
     ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", (8, 8), "text_encoder_3"),
     ("text_encoders__clip_g__transformer__text_model__encoder__layers__0__mlp__fc1", (64, 16), "text_encoder_2"),
     ("text_encoders__clip_l__transformer__text_model__encoder__layers__0__mlp__fc1", (32, 8), "text_encoder"),
     ("text_encoder_2__encoder__layers__0__mlp__fc1", (64, 16), "text_encoder_2"),
     ("lora_unet_proj", (4, 4), "transformer"), ("proj", (4, 4), "transformer")],
)  # fmt: skip
def test_text_encoders_are_told_by_name_number_or_size(
    stem: str, shape: tuple[int, int], component: str, tmp_path: Path
) -> None:
    file = read_lora(lora_of(tmp_path, **{stem: shape}))
    assert list(changes(file, ENCODERS)) == [component]
    if stem.startswith("lora_te3"):  # one that this pipeline counts otherwise
        fewer = [*ENCODERS[:1], replace(ENCODERS[3], component="text_encoder_2")]
        assert list(changes(file, fewer)) == ["text_encoder_2"]


@pytest.mark.parametrize(
    ("stem", "shape", "named"),
    [("lora_te1_encoder_layers_1_mlp_fc1", (32, 8), r"nearest: encoder_layers_0_mlp_fc1"),
     ("text_encoders__x__transformer__encoder__layers__0__mlp__fc1", (5, 5), "text_encoders.x"),
     (f"lora_te1_{INSIDE}", (64, 16), r"does not fit its weight of shape \[32, 8\]"),
     ("lora_unet_a_b", (4, 4), "lora_unet_a_b is no module"), ("unet__proj", (4, 4), "unet.proj is no module")],
)  # fmt: skip
def test_keys_that_fit_nothing_or_two_things(stem: str, shape: tuple[int, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(PorterError, match=named):
        changes(read_lora(lora_of(tmp_path, **{stem: shape})), ENCODERS)


def test_of_two_denoisers_one_must_be_named(tmp_path: Path) -> None:
    two = [
        Target(name, "T", specs({"proj.weight": (4, 4)}), predicts=True) for name in ("transformer", "transformer_2")
    ]
    for stem, said in (("proj", None), ("diffusion_model__proj", None), ("transformer_2__proj", "transformer_2")):
        file = read_lora(lora_of(tmp_path, **{stem: (4, 4)}))
        if said is None:
            with pytest.raises(UsageError, match="does not say which of transformer and transformer_2"):
                changes(file, two)
        else:
            assert list(changes(file, two)) == [said]
        assert list(changes(file, two, "transformer")) == ["transformer"]
        assert list(changes(file, two, "transformer_2")) == ["transformer_2"]
        with pytest.raises(UsageError, match="no unet that predicts"):
            changes(file, two, "unet")
