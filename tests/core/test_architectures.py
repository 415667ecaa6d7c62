"""Architectures are told by their tensor names: every recorded layout, all-in-one files, variants, strangers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conversions import record_layouts
from porter.core.architectures import Architecture, architectures, fold, guesses, parts, template
from porter.core.family import Component, Family, families
from porter.core.originals import belongs, recipe_for
from porter.core.planning import plan
from tests.sparse_models import names_of, sparse

Shapes = dict[str, tuple[int, ...]]


def by_name(family: str | None, component: str, layout: str, model: str | None = None) -> Architecture:
    return next(
        known
        for known in architectures()
        if (known.family, known.component, known.layout) == (family, component, layout) and model in (None, known.model)
    )


def test_templates() -> None:
    assert template("blocks.12.attn.0.weight") == "blocks.{}.attn.{}.weight"
    assert template("conv1.w2.3x") == "conv1.w2.3x" and template("0.weight") == "{}.weight"
    assert fold({"a.0": (2,), "a.1": (2,), "a.2": (3,)})["a.{}"] == {(2,): 2, (3,): 1}


def test_every_fact_says_where_it_comes_from() -> None:
    assert len(architectures()) > 150
    for known in architectures():
        assert known.templates and known.made and known.class_name
        assert known.family is None or known.family in families()
        from_libraries = known.made.split()[0] in ("diffusers", "transformers")
        assert known.layout.startswith(("diffusers", "transformers")) or not from_libraries or known.derived, known


@pytest.mark.parametrize("number", range(len(architectures())))
def test_every_architecture_is_told_by_its_own_names(number: int) -> None:
    """The best guess is the architecture itself, or one with the very same templates and shapes."""
    known = architectures()[number]
    best = guesses(names_of(known), 1)[0]
    assert best.score == 1.0
    assert best.architecture is known or best.architecture.templates == known.templates


def test_variants_are_told_by_names_and_shapes() -> None:
    known = by_name("flux1", "transformer", "original")
    shapes = names_of(known)

    def told(changed: Shapes) -> str | None:
        variant = known.variant(changed)
        return variant.name if variant else None

    dev = told(shapes)
    assert dev and "dev" in dev
    schnell = told({name: shape for name, shape in shapes.items() if not name.startswith("guidance_in")})
    assert schnell and "schnell" in schnell
    fill = told({**shapes, "img_in.weight": (3072, 384)})
    assert fill and "Fill" in fill


def test_an_all_in_one_file_is_taken_apart(tmp_path: Path) -> None:
    unet = names_of(by_name("sd1", "unet", "original"))
    vae = names_of(by_name(None, "vae", "original", "Stable Diffusion 1.5"))
    whole = {f"model.diffusion_model.{name}": shape for name, shape in unet.items()}
    whole |= {f"first_stage_model.{name}": shape for name, shape in vae.items()}
    whole |= {f"model_ema.{name.replace('.', '')}": shape for name, shape in unet.items()}
    found = {part.prefix: part for part in parts(whole)}
    assert set(found) == {"model.diffusion_model.", "first_stage_model.", ""}
    best = found["model.diffusion_model."].sure
    assert best and best.architecture.family == "sd1" and best.score == 1.0
    planned = plan(sparse(tmp_path / "v1-5.safetensors", whole))
    assert [part.name for part in planned.components[:2]] == ["unet", "vae"]
    assert [extra.name for extra in planned.extras] == ["averaged copies"] and planned.family == "sd1"
    sizes = sum(part.bytes for part in planned.components) + planned.extras[0].bytes
    assert sizes == sum(2 * math.prod(shape) for shape in whole.values())


SHARED = [
    (family, part, known)
    for family in families().values()
    for part in family.components
    for known in architectures()
    if f"{known.family}:{known.class_name}" in part.layouts and known.component == part.name
]  # fmt: skip


@pytest.mark.parametrize(("family", "part", "known"), SHARED, ids=lambda value: getattr(value, "name", None))
def test_an_original_layout_that_another_family_takes_too_is_told_by_the_files_name(
    family: Family, part: Component, known: Architecture, tmp_path: Path
) -> None:
    shapes = names_of(known)
    named = plan(sparse(tmp_path / str(part.original_name), shapes))
    assert named.family == family.name
    assert [(one.class_name, one.recipe) for one in named.components] == [
        (part.class_names[0], recipe_for(family, part, known))
    ]
    assert plan(sparse(tmp_path / "weights.safetensors", shapes)).family == known.family


KEPT = [known for known in architectures() if known.layout == "diffusers" and belongs(known).recipe]


@pytest.mark.parametrize("known", KEPT, ids=lambda known: known.class_name)
def test_a_bare_file_whose_names_the_library_kept_needs_only_a_config(known: Architecture, tmp_path: Path) -> None:
    """A recipe that renames nothing writes the config; where there is one, nothing is left to do."""
    file = sparse(tmp_path / "alone" / "model.safetensors", names_of(known))
    (part,) = plan(file).components
    assert (part.status, part.recipe, part.class_name) == ("convert", belongs(known).recipe, known.class_name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": known.class_name}))
    file.rename(tmp_path / "diffusion_pytorch_model.safetensors")
    (part,) = plan(tmp_path).components
    native = any(part.class_name == c.class_names[0] and c.native for f in families().values() for c in f.components)
    assert (part.status, part.recipe) == ("native" if native else "reuse", None)


def test_a_stranger_gets_guesses_and_not_a_name(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in names_of(by_name("flux1", "transformer", "original")).items()
              if "img_attn" not in name}  # fmt: skip
    shapes |= {f"double_blocks.{i}.new_attn.{name}.weight": (64, 64) for i in range(4) for name in "abcdefghijkl"}
    planned = plan(sparse(tmp_path / "new.safetensors", shapes))
    (part,) = planned.components
    assert part.status == "port" and part.class_name is None and planned.family is None
    first = part.guesses[0]
    assert first["family"] == "flux1" and 0.3 < first["score"] < 0.85
    assert any("img_attn" in name for name in first["missing"])
    assert any("new_attn" in name for name in first["extra"])


def test_a_linear_stored_as_a_convolution_is_another_layout() -> None:
    shapes = names_of(by_name("flux1", "transformer", "original"))
    bent = {name: (*shape, 1, 1) if len(shape) == 2 else shape for name, shape in shapes.items()}
    assert guesses(bent, 1)[0].score < 0.7


def test_an_equal_layout_of_two_families_is_named_and_not_chosen(tmp_path: Path) -> None:
    """Wan's and Qwen-Image's autoencoders have the same names and shapes; beside a transformer the family decides."""
    vae = names_of(by_name("wan", "vae", "diffusers", "Wan2.1 VAE"))
    (part,) = plan(sparse(tmp_path / "vae.safetensors", vae)).components
    assert part.class_name is None and part.model is None
    assert "AutoencoderKLQwenImage (qwen_image) or AutoencoderKLWan (wan) alike" in part.note
    sparse(tmp_path / "both" / "a.safetensors", vae)
    sparse(tmp_path / "both" / "b.safetensors", names_of(by_name("wan", "transformer", "diffusers")))
    found = plan(tmp_path / "both")
    assert found.family == "wan" and {part.class_name for part in found.components} == {
        "WanTransformer3DModel", "AutoencoderKLWan",
    }  # fmt: skip


def test_everything_in_an_all_in_one_file_has_a_name(tmp_path: Path) -> None:
    """Text encoders behind numbered prefixes, the schedule's buffers and averaged copies: nothing is left over."""
    clip = names_of(by_name(None, "text_encoder", "diffusers", "CLIP ViT-L/14 text"))
    bigg = names_of(by_name(None, "text_encoder", "original", "OpenCLIP ViT-H/14 text"))
    unet = names_of(by_name("sdxl", "unet", "original", "Stable Diffusion XL refiner"))
    whole = {f"conditioner.embedders.0.transformer.{name}": shape for name, shape in clip.items()}
    whole |= {f"conditioner.embedders.1.model.{name}": shape for name, shape in bigg.items()}
    whole |= {f"model.diffusion_model.{name}": shape for name, shape in unet.items()}
    whole |= {"denoiser.sigmas": (1000,), "model_ema.decay": (1,), "model_ema.out0weight": (4, 4)}
    found = plan(sparse(tmp_path / "all.safetensors", whole))
    assert [(part.name, part.class_name) for part in found.components] == [
        ("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("unet", "UNet2DConditionModel"),
    ]  # fmt: skip
    assert {extra.name for extra in found.extras} == {"averaged copies", "noise schedule"}
    counted = (found.parameters or 0) + sum(extra.parameters for extra in found.extras)
    assert found.family == "sdxl" and counted == sum(map(math.prod, whole.values()))
    assert not any("no known layout" in line for line in found.warnings)


def test_an_averaged_copy_under_a_prefix_of_its_own_is_no_second_component(tmp_path: Path) -> None:
    names = names_of(by_name("flux1", "transformer", "original"))
    whole = {f"model.{name}": shape for name, shape in names.items()} | {f"ema.{n}": s for n, s in names.items()}
    found = plan(sparse(tmp_path / "both.safetensors", whole))
    assert [part.name for part in found.components] == ["transformer"] and found.extras[0].name == "averaged copies"
    assert found.parameters == sum(map(math.prod, names.values()))


def test_a_pruned_model_is_not_called_a_released_one(tmp_path: Path) -> None:
    names = names_of(by_name("flux1", "transformer", "original"))
    pruned = {n: s for n, s in names.items() if not n.startswith("double_blocks.") or int(n.split(".")[1]) < 8}
    assert plan(sparse(tmp_path / "dev.safetensors", names)).components[0].model
    assert plan(sparse(tmp_path / "flex.safetensors", pruned)).components[0].model is None


def test_a_size_that_was_never_released_has_no_name(tmp_path: Path) -> None:
    """Names of Wan 2.2 TI2V 5B and nearly its shapes, but for the channels that go in."""
    names = names_of(by_name("wan", "transformer", "original", "Wan2.2 TI2V 5B"))
    assert plan(sparse(tmp_path / "5b.safetensors", names)).components[0].model == "Wan2.2-TI2V-5B"
    names["patch_embedding.weight"] = (3072, 52, 1, 2, 2)
    assert plan(sparse(tmp_path / "more.safetensors", names)).components[0].model is None


def test_half_a_model_has_a_closest_family(tmp_path: Path) -> None:
    names = names_of(by_name("flux1", "transformer", "original"))
    half = {name: shape for name, shape in names.items() if name.startswith("double_blocks")}
    found = plan(sparse(tmp_path / "half.safetensors", half))
    assert found.family is None and found.closest
    assert found.closest.family == "flux1" and not found.closest.reusable and found.closest.differences


def test_a_layouts_file_or_checkout_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "layouts.json"
    file.write_text('{"schema": "porter.layouts/1", "layouts": []}')
    for arguments, words in (
        ([tmp_path / "none.json"], "cannot read"),
        ([file, "--repo", f"a/b={tmp_path / 'none'}"], "a checkout in DIR"),
    ):
        monkeypatch.setattr("sys.argv", ["record_layouts", *map(str, arguments)])
        with pytest.raises(SystemExit, match=words):
            record_layouts.main()
