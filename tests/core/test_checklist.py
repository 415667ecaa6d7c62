"""Checklists: real plans at every target; paths that exist; nothing ticked on belief; hostile names kept inside."""

from __future__ import annotations

import json
import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from porter.commands._checklist import print_checklist, to_markdown
from porter.core.checklist import TARGETS, Checklist, Step, checklist
from porter.core.errors import BadInputError, MissingError, UsageError
from porter.core.family import families, proof
from porter.core.plan import PortPlan
from porter.core.planning import plan
from porter.core.targets import Target, target_named
from porter.core.targets.checks import OF_A_MODEL, OF_A_PIECE
from porter.core.targets.names import camel, derive, role, snake
from porter.core.targets.record import check_commit, inventory

ROOT = Path(__file__).parents[2]
FRAMEWORKS = tuple(target for target in TARGETS if target != "porter")
SGLANG = "python/sglang/multimodal_gen"
CHECKOUTS = {"diffusers": "diffusers", "sglang": "sglang", "fastvideo": "FastVideo"}
WAN = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
HELIOS = {**WAN, "transformer": ("diffusers", "HeliosTransformer3DModel")}
LUNA = {
    **WAN,
    "transformer": ("diffusers", "LunaVideoTransformer3DModel"),
    "transformer_2": ("diffusers", "LunaVideoTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLLuna"),
    "scheduler": ("diffusers", "LunaFlowScheduler"),
    "conditioner": ("luna", "LunaConditioner"),
    "image_encoder": ("luna_code", "LunaVisionEncoder"),
}
MOON = {**WAN, "unet": ("diffusers", "MoonUNet2DConditionModel")}
del MOON["transformer"]


def pipeline(folder: Path, class_name: str, parts: Mapping[str, tuple[str, str]]) -> Path:
    """A pipeline folder with the smallest weights that are some."""
    folder.mkdir(parents=True)
    index = {"_class_name": class_name, "_diffusers_version": "0.36.0", **{k: list(v) for k, v in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (library, kind) in parts.items():
        (folder / name).mkdir()
        if kind.endswith(("Scheduler", "Tokenizer", "TokenizerFast")):
            file = "scheduler_config.json" if kind.endswith("Scheduler") else "tokenizer_config.json"
            (folder / name / file).write_text("{}")
            continue
        said = {"architectures": [kind]} if library == "transformers" else {"_class_name": kind}
        (folder / name / "config.json").write_text(json.dumps(said))
        weights = "model" if library == "transformers" else "diffusion_pytorch_model"
        save_file({"w": numpy.zeros((2, 2), numpy.float32)}, folder / name / f"{weights}.safetensors")
    return folder


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PortPlan]:
    """Real plans: convertible and native, known, a known pipeline's sibling, unknown, a lone file of each kind."""
    place = tmp_path_factory.mktemp("models")
    save_file({"head.0.w": numpy.zeros((2, 2), numpy.float32)}, place / "my-model_v1.safetensors")
    tiny = ROOT / "porter" / "builtin" / "tiny_flux" / "flux1-tiny.safetensors"
    return {
        "tiny": plan("builtin:tiny-flux"),
        "tiny file": plan(tiny),
        "wan": plan(pipeline(place / "wan", "WanPipeline", WAN)),
        "helios": plan(pipeline(place / "helios", "HeliosPipeline", HELIOS)),
        "sibling": plan(pipeline(place / "sibling", "WanAudioToVideoPipeline", WAN)),
        "luna": plan(pipeline(place / "luna video", "LunaVideoPipeline", LUNA)),
        "moon": plan(pipeline(place / "moon", "MoonPipeline", MOON)),
        "file": plan(place / "my-model_v1.safetensors"),
    }


KINDS = ("tiny", "tiny file", "wan", "sibling", "luna", "moon", "file")


def step(found: Checklist, text: str) -> Step:
    """The one step whose text holds `text`."""
    hits = [each for each in found.steps if text in each.text]
    assert len(hits) == 1, [each.text for each in found.steps]
    return hits[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_filled_in_and_survives_json(plans: dict[str, PortPlan], kind: str, target: str) -> None:
    found = checklist(plans[kind], target)
    assert found.steps and len(set(found.steps)) == len(found.steps)
    for each in found.steps:
        assert each.text and each.group
        for words in (each.text, each.why, *each.paths, each.command or ""):
            assert "{" not in words and "}" not in words and "None" not in re.sub(r"cls=None", "", words)
        assert all(re.fullmatch(r"[\w./-]+", path, re.ASCII) and not path.startswith("/") for path in each.paths)
        assert all(".." not in path.split("/") and "" not in path.split("/") for path in each.paths)
        assert not (each.done and (each.paths or each.command)), "what is done has nothing left to write"
    document = json.loads(json.dumps(found.to_json()))
    assert Checklist.from_json(document) == found


@pytest.mark.parametrize("target", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_to_edit_exist_and_files_to_create_do_not(plans: dict[str, PortPlan], kind: str, target: str) -> None:
    framework = target_named(target)
    for each in checklist(plans[kind], target).steps:
        for path in each.edits:
            assert path in framework.files, f"{path} is to be edited, and {framework.repository} has no such file"
        for path in each.creates:
            assert path not in framework.files


def static_folder(path: str) -> str:
    """The part of a template's path that stands before the first name, as a folder."""
    return path.split("{")[0].rpartition("/")[0] if "{" in path else path.rpartition("/")[0]


@pytest.mark.parametrize("target", FRAMEWORKS)
def test_folders_of_new_files_exist(target: str) -> None:
    framework = target_named(target)
    folders = {parent.as_posix() for file in framework.files for parent in Path(file).parents}
    for template in framework.steps:
        for path in template.creates:
            assert static_folder(path) in folders, path


@pytest.mark.reference
@pytest.mark.parametrize("target", FRAMEWORKS)
def test_a_checkout_has_every_file_that_a_checklist_names(plans: dict[str, PortPlan], target: str) -> None:
    checkouts = os.environ.get("PORTER_REFERENCES")
    root = Path(checkouts or "/nonexistent") / CHECKOUTS[target]
    if not root.is_dir():
        pytest.skip(f"PORTER_REFERENCES names no folder that holds {CHECKOUTS[target]}/")
    framework = target_named(target)
    named = {path for kind in KINDS for each in checklist(plans[kind], target).steps for path in each.edits}
    named |= {path for each in framework.steps for path in each.edits if "{" not in path} | set(framework.guide)
    named |= {static_folder(path) for each in framework.steps for path in each.creates}
    named |= {*framework.classes.values(), *framework.pipelines.values(), *framework.models.values()}
    assert len(named) > 100
    assert not sorted(path for path in named if not (root / path).exists())
    for names in (framework.classes, framework.pipelines, framework.models):
        wrong = [
            n for n, f in names.items() if n not in (root / f).read_text("utf-8") and n not in registry(root, target)
        ]
        assert not wrong
    spoken = words_of_code(framework)
    text = "\n".join((root / file).read_text("utf-8", "replace") for file in framework.files if (root / file).is_file())
    missing = [word for word in sorted(spoken) if not re.search(rf"\b{re.escape(word)}\b", text)]
    assert not missing, f"{framework.repository} has no {', '.join(missing)}"


def registry(root: Path, target: str) -> str:
    """The table of names that a framework keeps by hand, where it has one."""
    file = {
        "sglang": "python/sglang/multimodal_gen/runtime/models/registry.py",
        "fastvideo": "fastvideo/models/registry.py",
    }
    return (root / file[target]).read_text("utf-8") if target in file else ""


def words_of_code(framework: Target) -> set[str]:
    """Identifiers of the framework that the steps' code spans speak of, without those that a name fills in."""
    spans = [span for each in framework.steps for span in re.findall(r"`([^`]*)`", f"{each.text} {each.why}")]
    bare = " ".join(re.sub(r"\w*\{\w+\}\w*", " ", span) for span in spans if "/" not in span)
    return set(re.findall(r"\b[A-Za-z_]\w{3,}\b", bare)) - {"max_diff"}


def test_what_porter_has_is_ticked(plans: dict[str, PortPlan]) -> None:
    found = checklist(plans["tiny"], "diffusers")
    recipe = step(found, "Tensor names and tensor surgery of `transformer`")
    assert recipe.done and "conversions.flux1.recipe:TRANSFORMER" in recipe.why
    assert step(found, "Reference trace of the original code").done
    assert step(found, "Already in the diffusers layout").text.endswith("`text_encoder`, `text_encoder_2`")
    convert = step(found, "Convert the weights")
    assert not convert.done and convert.command == "porter convert builtin:tiny-flux -o tiny-flux-port --verify"
    parity = step(found, "Parity of `transformer`, `vae`")
    assert not parity.done and parity.command == "porter parity tiny-flux-port", "a trace is no parity of this port"
    own = checklist(plans["tiny"], "porter")
    for words in ("Recipe of `vae`", "Trace of `transformer`", "Parity cases", "natively", "Layouts recorded"):
        assert step(own, words).done, words
    assert not step(own, "What it generates is no noise").done and not step(own, "A LoRA loads").done


def test_nothing_is_ticked_for_a_family_without_recipe_and_trace(plans: dict[str, PortPlan]) -> None:
    assert not proof(families()["helios"])
    own = checklist(plans["helios"], "porter")
    assert {each.text for each in own.steps if each.done} == {
        step(own, "`FAMILY`").text,
        step(own, "Layouts recorded").text,
        step(own, "Used as they are").text,
    }
    assert step(own, "Trace of `vae`").creates == ("conversions/helios/reference/vae.safetensors",)
    for target in FRAMEWORKS:
        assert not [each for each in checklist(plans["sibling"], target).steps if each.done and "trace" in each.text]


def test_a_trace_of_one_component_ticks_no_other(plans: dict[str, PortPlan]) -> None:
    given = plans["tiny"]
    parts = tuple(replace(part, class_name="OtherVAE") if part.name == "vae" else part for part in given.components)
    changed = replace(given, components=parts)
    assert not step(checklist(changed, "diffusers"), "Reference trace of the original code").done
    assert step(checklist(changed, "porter"), "Trace of `transformer`").done
    assert not step(checklist(changed, "porter"), "Trace of `vae`").done


def test_parity_is_ticked_only_for_a_port_that_passed(plans: dict[str, PortPlan], tiny_port: Path) -> None:
    unproven = plan(tiny_port)
    assert not step(checklist(unproven, "porter"), "Component parity").done
    passed = replace(unproven, verdict="passed")
    assert passed != unproven and step(checklist(passed, "porter"), "Component parity").done


@pytest.mark.parametrize("target", FRAMEWORKS)
def test_a_known_pipeline_is_reused_not_written(plans: dict[str, PortPlan], target: str) -> None:
    found = checklist(plans["wan"], target)
    exists = step(found, "Pipeline `WanPipeline` exists")
    assert exists.done and target_named(target).pipelines["WanPipeline"] in exists.why
    assert not [path for each in found.steps for path in each.paths]
    reused = next(each for each in found.steps if "`WanTransformer3DModel` (`" in each.text)
    assert reused.done and "`AutoencoderKLWan` (`" in reused.text


@pytest.mark.parametrize(
    ("target", "text", "creates"),
    [
        ("diffusers", "VideoTransformer3DModel`: `M", "src/diffusers/models/transformers/transformer_luna_video.py"),
        ("diffusers", "`AutoencoderKLLuna`, if no", "src/diffusers/models/autoencoders/autoencoder_kl_luna.py"),
        ("diffusers", "`LunaFlowScheduler`, if no", "src/diffusers/schedulers/scheduling_luna_flow.py"),
        ("diffusers", "`LunaVideoPipelineTesterConfig`", "tests/pipelines/luna_video/test_pipeline_luna_video.py"),
        ("sglang", "`LunaVideoTransformer3DModel` with", f"{SGLANG}/runtime/models/dits/luna_video.py"),
        ("sglang", "`LunaVisionEncoder`", f"{SGLANG}/runtime/models/encoders/luna_vision_encoder.py"),
        ("sglang", "`LunaVideoPipelineConfig`:", f"{SGLANG}/configs/pipeline_configs/luna_video.py"),
        ("fastvideo", "`LunaVideoTransformer3DModel(BaseDiT)`", "fastvideo/models/dits/luna_video.py"),
        ("fastvideo", "`AutoencoderKLLuna` with", "fastvideo/models/vaes/luna_videovae.py"),
        ("porter", "Recipe of `vae`", "conversions/luna_video/recipe.py"),
    ],
)  # fmt: skip
def test_names_are_filled_in(plans: dict[str, PortPlan], target: str, text: str, creates: str) -> None:
    found = step(checklist(plans["luna"], target), text)
    assert not found.done and creates in found.creates


def test_one_class_in_two_components_is_written_once(plans: dict[str, PortPlan]) -> None:
    for target in FRAMEWORKS:
        found = checklist(plans["luna"], target)
        hits = [
            each for each in found.steps if any(path.endswith("transformer_luna_video.py") for path in each.creates)
        ]
        assert len(hits) <= 2, [each.text for each in hits]  # the model, and its tests
    both = step(checklist(plans["luna"], "fastvideo"), "Parity test of `transformer, transformer_2`")
    assert both.creates == ("tests/local_tests/luna_video/test_luna_video_transformer_parity.py",)


def test_a_unet_goes_where_unets_are(plans: dict[str, PortPlan]) -> None:
    found = checklist(plans["moon"], "diffusers")
    made = [path for each in found.steps for path in each.creates]
    assert "src/diffusers/models/unets/unet_moon.py" in made and "tests/models/unets/test_models_unet_moon.py" in made
    assert not [path for path in made if "transformers/" in path]


def test_a_sibling_extends_its_familys_files(plans: dict[str, PortPlan]) -> None:
    found = checklist(plans["sibling"], "fastvideo")
    stages = step(found, "`WanAudioToVideoPipeline(ComposedPipelineBase)`")
    assert stages.creates == ("fastvideo/pipelines/basic/wan/wan_audio_to_video_pipeline.py",)
    assert stages.edits == ("fastvideo/pipelines/basic/wan/__init__.py",)
    presets = step(found, "`InferencePreset`s")
    assert presets.edits[0] == "fastvideo/pipelines/basic/wan/presets.py" and "exists already" in presets.why


def test_the_style_decides_stages(plans: dict[str, PortPlan]) -> None:
    modular, hybrid = (replace(plans["luna"], style=style) for style in ("Modular", "Hybrid"))
    stage = f"{SGLANG}/runtime/pipelines_core/stages/model_specific_stages/luna_video.py"
    for given, wanted in ((modular, False), (hybrid, True)):
        found = checklist(given, "sglang")
        assert (stage in [path for each in found.steps for path in each.creates]) is wanted
        assert any("LunaVideoBeforeDenoisingStage" in each.text for each in found.steps) is wanted
        assert any("add_standard_t2i_stages" in each.text for each in found.steps) is not wanted


def test_a_hub_model_is_registered_by_its_id(plans: dict[str, PortPlan]) -> None:
    known = replace(plans["wan"], kind="hub", source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", revision="a" * 40)
    for target in ("sglang", "fastvideo"):
        assert step(checklist(known, target), "`Wan-AI/Wan2.1-T2V-1.3B-Diffusers` in `hf_model_paths`").done
        other = checklist(replace(known, source="someone/else"), target)
        assert not step(other, "`someone/else` in `hf_model_paths`").done
    saved = step(checklist(known, "porter"), "Plan saved").command
    assert saved == f"porter plan Wan-AI/Wan2.1-T2V-1.3B-Diffusers --revision {'a' * 40} -o plan.json"


def test_a_model_without_a_name_gets_proposals_and_is_told_so(plans: dict[str, PortPlan]) -> None:
    found = checklist(plans["file"], "diffusers")
    assert any("`MyModelV1` and `my_model_v1`" in note and "choose the names" in note for note in found.notes)
    assert any("`MyModelV1Transformer2DModel` is a proposal" in note for note in found.notes)
    recipe = step(found, "Tensor names and tensor surgery")
    assert not recipe.done and "no recipe of porter's takes it" in recipe.why
    assert not step(found, "Convert the weights").command
    told = checklist(plans["tiny file"], "sglang")
    assert any("`FluxPipeline` is the plainest" in note for note in told.notes)
    assert not checklist(plans["luna"], "diffusers").notes[2:]


def test_a_new_family_never_takes_a_known_ones_folder(plans: dict[str, PortPlan]) -> None:
    for taken in ("flux1", "common"):
        named = replace(plans["file"], source=f"/somewhere/{taken}.safetensors")
        assert derive(named).model == taken and named.family is None
        found = checklist(named, "porter")
        assert step(found, "`FAMILY`").creates == (f"conversions/{taken}_new/__init__.py",)
        assert not any(each.done for each in found.steps)


EVIL = (
    "Evil`Pipe\n- [x] done\n# head <img src=x onerror=a()> | @all #12 ![x](http://e) {0} {class} \x1b[31m\u202e$(id)`"
)
PATHS = "../../../etc/passwd"


@pytest.fixture(scope="module")
def hostile(plans: dict[str, PortPlan]) -> list[PortPlan]:
    made = []
    for evil in (EVIL, PATHS, "", "x" * 5000, "class", "1", "{", "ПайплайнPipeline"):
        part = replace(plans["luna"].components[0], name=evil, class_name=evil, library=evil, layout="unknown",
                       files=("w",), status="port", guesses=({"class": evil, "score": 0.5},))  # fmt: skip
        given = replace(plans["luna"], pipeline_class=evil, source=f"/m/{evil}", style="Hybrid", style_reason=evil,
                        components=(part, replace(part, class_name=None, library=None), plans["luna"].components[1]),
                        next=(f"porter convert {shlex.quote(evil)} -o x",))  # fmt: skip
        made += [given, replace(given, pipeline_class=None, kind="hub", revision=evil)]
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_names_stay_names(hostile: list[PortPlan], target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given in hostile:
        found = checklist(given, target)
        assert Checklist.from_json(json.loads(json.dumps(found.to_json()))) == found
        for each in found.steps:
            for path in each.paths:
                assert re.fullmatch(r"[A-Za-z0-9_./-]+", path) and ".." not in path and not path.startswith("/")
                assert all(0 < len(part) < 200 for part in path.split("/"))
            if each.command and each.command.startswith("porter plan"):
                assert given.source in shlex.split(each.command)
        text = to_markdown(found)
        items = [line for line in text.split("\n") if line.startswith("- [")]
        assert len(items) == len(found.steps)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
        for bad in ("<img", "@all", "![x]", "http://", "onerror", "$(id)", "passwd", "#12"):
            assert bad not in outside, outside
        print_checklist(found)
        printed = capsys.readouterr().out
        assert "\x1b" not in printed and "\u202e" not in printed
        assert sum(line.startswith(("  [x] ", "  [ ] ")) for line in printed.split("\n")) == len(found.steps)


def test_markdown_escapes_what_stands_outside_code_spans(plans: dict[str, PortPlan]) -> None:
    found = checklist(plans["luna"], "diffusers")
    planted = replace(found, steps=(Step("g", "<b>x</b> [l](u) *a* @me #1 `ok <i>` end", why="a|b\n- [x] no"),))
    text = to_markdown(planted)
    assert r"- [ ] \<b\>x\</b\> \[l\]\(u) \*a\* \@me \#1 `ok <i>` end" in text
    assert "\n- [x]" not in text and "a\\|b" in text


def test_markdown_is_a_task_list_after_the_guide(plans: dict[str, PortPlan]) -> None:
    text = to_markdown(checklist(plans["luna"], "sglang"))
    assert text.startswith("### `LunaVideoPipeline` in SGLang-Diffusion\n")
    assert "`sgl-project/sglang@v0.5.23`" in text
    assert "- [x] Reuse native classes: `UMT5EncoderModel` (`runtime/models/encoders/t5.py`)\n" in text
    assert "\n- [ ] " in text and len(text) < 8000
    assert "`src/diffusers/loaders/{lora_pipeline.py,__init__.py}`" in to_markdown(
        checklist(plans["luna"], "diffusers")
    )


def test_terminal_output_counts_what_is_done(plans: dict[str, PortPlan], capsys: pytest.CaptureFixture[str]) -> None:
    found = checklist(plans["tiny"], "fastvideo")
    print_checklist(found)
    printed = capsys.readouterr().out
    assert f"{sum(each.done for each in found.steps)} of {len(found.steps)} done" in printed
    assert "  [x] Pipeline FluxPipeline exists" in printed and "2f3d4074064e" in printed


@pytest.mark.parametrize("target", TARGETS)
def test_templates_use_known_words_only(plans: dict[str, PortPlan], target: str) -> None:
    """Each name stands in a code span, or brings its own; each check and condition exists; no model is spoken of."""
    framework = target_named(target)
    wrapped = {"names", "classes", "modules", "style_words"}
    for template in framework.steps:
        assert not template.done or template.done in OF_A_MODEL | OF_A_PIECE
        assert template.done not in OF_A_PIECE or template.each
        for text in (template.text, template.why):
            outside = re.sub(r"`[^`]*`", "", text)
            assert text.count("`") % 2 == 0
            assert {name for _, name, _, _ in string.Formatter().parse(outside) if name} <= wrapped, text
    everything = [each for given in plans.values() for each in checklist(given, target).steps]
    assert everything  # an unknown condition or name raises in `checklist`


def test_unknown_targets_and_documents_are_refused(plans: dict[str, PortPlan]) -> None:
    with pytest.raises(UsageError, match="comfyui"):
        checklist(plans["tiny"], "comfyui")
    document = checklist(plans["tiny"], "porter").to_json()
    for broken in (
        {**document, "schema": "x"},
        {**document, "odd": 1},
        {**document, "guide": 3},
        {**document, "steps": [{}]},
    ):
        with pytest.raises(BadInputError):
            Checklist.from_json(broken)


def test_no_torch_is_imported(plans: dict[str, PortPlan]) -> None:
    code = (
        "import sys; from porter.core.planning import plan; from porter.core.checklist import TARGETS, checklist;"
        "found = plan('builtin:tiny-flux'); [checklist(found, t) for t in TARGETS];"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("text", "snaked", "cameled"),
    [
        ("LunaVideo", "luna_video", "LunaVideo"),
        ("SD3", "sd3", "SD3"),
        ("AutoencoderKLLuna", "autoencoder_kl_luna", "AutoencoderKLLuna"),
        ("my-model_v1.5", "my_model_v1_5", "MyModelV15"),
        ("3d", "m_3d", "M3d"),
        ("import", "import_model", "Import"),
        ("../..", "", ""),
        ("Луна", "", ""),
    ],
)
def test_snake_and_camel(text: str, snaked: str, cameled: str) -> None:
    assert (snake(text), camel(text)) == (snaked, cameled)


def test_roles(plans: dict[str, PortPlan]) -> None:
    roles = {part.name: role(part) for part in plans["luna"].components}
    assert roles == {
        "scheduler": "scheduler", "text_encoder": "encoder", "tokenizer": "processor", "transformer": "denoiser",
        "transformer_2": "denoiser", "vae": "vae", "conditioner": "other", "image_encoder": "encoder",
    }  # fmt: skip


def test_an_inventory_is_recorded_only_from_a_checkout_at_its_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    recorded = (ROOT / "porter/core/targets/diffusers.classes.json").read_bytes()
    command = [sys.executable, "-m", "porter.core.targets.record", "diffusers", tmp_path / "none", "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no such checkout" in done.stderr
    assert (ROOT / "porter/core/targets/diffusers.classes.json").read_bytes() == recorded
    with pytest.raises(MissingError, match="no git checkout"):
        check_commit(tmp_path, "abc")
    git("init", "-q")
    for name in ("a", "b"):
        (tmp_path / name).touch()
        git("add", name)
        git("commit", "-qm", name)
    here, before = git("rev-parse", "HEAD").strip(), git("rev-parse", "HEAD~1").strip()
    git("tag", "v1")
    check_commit(tmp_path, here)
    check_commit(tmp_path, "v1")
    for wrong in (before, here[:9], "v2"):
        with pytest.raises(BadInputError, match="is not at"):
            check_commit(tmp_path, wrong)
    with pytest.raises(BadInputError, match="nothing was recorded"):
        inventory("diffusers", tmp_path, here)


def test_the_docs_name_the_guides_that_a_checklist_cites() -> None:
    page = (ROOT / "docs/checklists.md").read_text()
    for name in TARGETS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        guide = target_named(name).guide
        assert all(file in row or file.partition("/references/")[2] in row for file in guide)
        assert row.split("|")[3].count(".md`") == len(guide)
