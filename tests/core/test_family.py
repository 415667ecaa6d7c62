"""The catalogue: listed lazily, told apart by tensor names, duplicates refused, no family named in shared code."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from porter.core.architectures import architectures, guesses
from porter.core.errors import BadInputError, UsageError
from porter.core.family import Component, Family, families, family_named, proof, resolve
from porter.core.originals import Known, belongs, is_dialect
from porter.core.source import open_source

ROOT = Path(__file__).parents[2]


def test_every_folder_of_the_catalogue_is_a_family() -> None:
    folders = {path.parent.name for path in (ROOT / "conversions").glob("*/__init__.py")} - {"common"}
    assert set(families()) == folders and folders
    for family in families().values():
        assert family.components and family.license_hint
        for part in family.components:
            assert part.class_names and bool(part.recipe) == bool(part.original_class) <= bool(part.original_files)
            assert bool(part.recipes) <= bool(part.recipe)
            assert len(part.layouts) == len(part.recipes) + bool(part.recipe)


def test_listing_the_catalogue_imports_no_recipe_no_model_and_no_torch() -> None:
    code = """
        import sys
        from porter.core.family import families
        families()
        heavy = [m for m in sys.modules if m.split(".")[0] in ("torch", "diffusers", "transformers", "numpy")
                 or m.endswith((".recipe", ".model", ".case", ".pipeline", ".pipelines"))]
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_every_lazy_reference_names_a_module_that_exists() -> None:
    for family in families().values():
        parts = [r for part in family.components for r in (*part.layouts.values(), part.native) if r]
        for reference in filter(None, [*parts, family.pipeline, family.cases]):
            path = ROOT / (reference.partition(":")[0].replace(".", "/") + ".py")
            assert path.is_file(), reference
            assert re.search(rf"^(class )?{reference.partition(':')[2]}\b", path.read_text(), re.MULTILINE), reference


def test_native_pipelines_are_pipelines_of_the_family() -> None:
    """That they are those which its module registers: tests/runtime/test_registry.py."""
    for family in families().values():
        known = {*family.pipeline_classes, *family.shared_pipelines}
        assert bool(family.native_pipelines) == bool(family.pipeline) and known >= set(family.native_pipelines)


def test_original_files_are_told_by_their_tensor_names() -> None:
    source = open_source("builtin:tiny-flux")
    for name in ("flux1-tiny.safetensors", "ae.safetensors"):
        header, _ = source.header(name)
        best = guesses({key: info.shape for key, info in header.items()}, 1)[0]
        known = belongs(best.architecture)
        assert known.recipe and known.family and known.family.name == "flux1"
    encoder = source.header("text_encoder/model.safetensors")[0]
    best = guesses({key: info.shape for key, info in encoder.items()}, 1)[0]
    assert belongs(best.architecture).recipe is None


def test_a_librarys_older_or_newer_names_are_no_original() -> None:
    """A class may be called as the original's is; the original's recipe cannot read its library's other names."""
    dialects = [known for known in architectures() if known.layout not in ("diffusers", "original")]
    told = {known.layout for known in dialects if is_dialect(known)}
    assert {"diffusers-old", "transformers-4", "transformers-5"} <= told
    for known in dialects:
        for family in (None, *families().values()) if is_dialect(known) else ():
            assert belongs(known, family).recipe is None


def test_a_component_may_take_several_original_layouts() -> None:
    one = Component("transformer", "diffusers", ("A",), ("a*",), original_class="Old", recipe="m:OLD")
    two = replace(one, recipes=(("else:Fused", "m:FUSED"),))
    assert one.layouts == {"Old": "m:OLD"} and two.layouts == {"Old": "m:OLD", "else:Fused": "m:FUSED"}
    assert Component("vae", "diffusers", ("B",)).layouts == {}
    family = Family("twin", "twin", ("TwinPipeline",), (two,))
    for owner, class_name, recipe in (
        ("twin", "Old", "m:OLD"), ("else", "Fused", "m:FUSED"), ("else", "Old", None), ("twin", "Fused", None),
    ):  # fmt: skip
        known = replace(architectures()[0], family=owner, class_name=class_name, layout="original")
        assert Known(known, family, two).recipe == recipe


def record(name: str, pipeline: str) -> Family:
    return Family(name, name, (pipeline,), (Component("vae", "diffusers", ("AutoencoderKL",)),))


TWIN = record("twin", "TwinPipeline")
OTHER = record("other", "OtherPipeline")
SAME_NAME = record("twin", "ThirdPipeline")
SAME_PIPELINE = record("fourth", "TwinPipeline")


@pytest.mark.parametrize("second", ["SAME_NAME", "SAME_PIPELINE"])
def test_duplicates_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    plug_in(monkeypatch, tmp_path, "TWIN", second)
    with pytest.raises(BadInputError, match="two families"):
        families()


def test_plug_ins_join_the_catalogue_and_must_be_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(families())
    plug_in(monkeypatch, tmp_path, "TWIN", "OTHER")
    assert set(families()) == before | {"twin", "other"}
    assert family_named("twin") is not None and proof(family_named("twin")) == []
    plug_in(monkeypatch, tmp_path, "ROOT")
    with pytest.raises(BadInputError, match="no Family record"):
        families()


def plug_in(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Installs another distribution whose records are those of this file."""
    info = folder / f"{'_'.join(names)}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {'-'.join(names)}\nVersion: 1.0\n")
    lines = [f"{name} = {__name__}:{name}\n" for name in names]
    (info / "entry_points.txt").write_text("[porter.families]\n" + "".join(lines))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.syspath_prepend(folder)
    families.cache_clear()


@pytest.fixture(autouse=True)
def fresh_catalogue() -> object:
    yield
    families.cache_clear()


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="flux1"):
        family_named("flux9")


def test_resolve_follows_dots() -> None:
    assert resolve("pathlib:Path.home") == Path.home


def test_shared_code_names_no_family() -> None:
    names = {word for family in families().values() for word in (family.name, *family.pipeline_classes)}
    names |= {name for f in families().values() for p in f.components if p.native for name in p.class_names}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b", re.IGNORECASE)
    shared = [ROOT / "porter" / "cli.py", *(ROOT / "porter" / "core").glob("*.py")]
    shared += [*(ROOT / "porter" / "core" / "ops").glob("*.py"), *(ROOT / "parity").glob("*.py")]
    shared += [*(ROOT / "runtime").rglob("*.py"), *(ROOT / "porter" / "commands").glob("*.py")]
    for path in shared:
        found = pattern.search(path.read_text("utf-8"))
        assert not found, f"{path.relative_to(ROOT)} names {found[0] if found else ''}"
