"""`porter plan` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from porter import cli
from porter.commands._render import console, table
from porter.core.plan import ComponentPlan, PortPlan
from porter.core.planning import plan
from tests.sparse_models import flux_file, flux_folder


def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for word in (
        "FluxPipeline", "flux1", "Modular: standard text-to-image", "FluxTransformer2DModel", "AutoencoderKL",
        "CLIPTextModel", "5.22 M", "BF16", "10.5 MB", "convert", "reuse", "conversions.flux1.recipe:TRANSFORMER",
    ):  # fmt: skip
        assert word in shown.out, word
    assert shown.out.splitlines()[-1].split(None, 1) == ["next", "porter convert builtin:tiny-flux -o tiny-flux-port"]


def test_verbose_shows_configs_and_quiet_only_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "builtin:tiny-flux", "-v"])
    assert "axes_dims_rope [8, 12, 12]" in capsys.readouterr().out
    cli.main(["plan", "builtin:tiny-flux", "-q"])
    assert capsys.readouterr().out == "porter convert builtin:tiny-flux -o tiny-flux-port\n"


def test_json_and_saved_plan_are_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux", "--json", "-o", str(tmp_path / "plan.json"), "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert printed == saved and PortPlan.from_json(saved) == plan("builtin:tiny-flux")


def test_the_next_command_can_be_pasted(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole chain from a folder with a space in its name: plan, the command it prints, plan of the result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_flux, tmp_path / "my model")
    (command,) = plan("my model").next
    words = shlex.split(command)
    assert words[0] == "porter" and cli.main([*words[1:], "-q"]) == 0
    port = tmp_path / "my model-port"
    found = plan(port)
    assert {part.name: part.status for part in found.components}["transformer"] == "native"
    assert found.warnings == ("parity of this port: missing",)
    assert found.next == (f"porter parity '{port}'", f"porter generate '{port}' \"a prompt\"")


def test_markup_in_names_is_text(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "[red]model[/nothing]"))
    assert cli.main(["plan", str(model)]) == 0
    assert "[red]model[/nothing]" in capsys.readouterr().out
    assert cli.main(["plan", str(model / "none[/bold]")]) == 4
    assert "none[/bold]" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "plan.schema.json").read_text())


def hostile(tmp_path: Path, tiny_flux: Path) -> Path:
    """A model whose names and values try to be markup, table cells, mentions and lines of their own."""
    model = Path(shutil.copytree(tiny_flux, tmp_path / "m|`od`el"))
    for file in (model / "text_encoder" / "config.json", model / "text_encoder_2" / "config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "hidden_act": HOSTILE, "dense_act_fn": HOSTILE}))
    (model / HOSTILE.replace("/", "")).with_suffix(".safetensors").write_bytes((model / "ae.safetensors").read_bytes())
    return model


HOSTILE = "gelu|`x`\n# Title <script>@all [a](http://b)\x1b]0;x\x07"


def test_the_document_follows_its_schema(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = jsonschema.Draft202012Validator(SCHEMA)
    sources = ["builtin:tiny-flux", str(tiny_flux / "ae.safetensors"), str(hostile(tmp_path, tiny_flux))]
    for source in sources:
        cli.main(["plan", source, "--json"])
        check.validate(json.loads(capsys.readouterr().out))
    document = plan("builtin:tiny-flux").to_json()
    for broken in ({**document, "more": 1}, {**document, "bytes": "12"}, {**document, "schema": "porter.plan/2"}):
        assert not check.is_valid(broken)
    described = set(SCHEMA["properties"]["components"]["items"]["properties"])
    assert described == {field.name for field in dataclasses.fields(ComponentPlan)}


@pytest.mark.parametrize("columns", [80, 140, 200])
def test_it_fits_the_terminal(
    columns: int, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["plan", str(tiny_flux)]) == 0
    lines = capsys.readouterr().out.splitlines()
    free = [line for line in lines if line.startswith(("next", str(tiny_flux)))]  # made to be pasted: never broken
    assert len(free) == 2 and max(len(line) for line in lines if line not in free) <= columns
    heads = next(line.split() for line in lines if line.startswith("component"))
    assert ("files" in heads, "dtypes" in heads, "config" in heads) == (columns > 80, columns > 80, columns == 200)
    assert any("FlowMatchEulerDiscreteScheduler" in line for line in lines)


@pytest.mark.parametrize("columns", [44, 60])
def test_names_are_broken_at_their_seams(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    console().print(f"copied    {'a_component/with/a-long/name' * 3}")
    first, *more = capsys.readouterr().out.splitlines()
    assert first.startswith("copied    a_") and all(line.startswith(" " * 10) for line in more)
    assert all(line.rstrip()[-1] in "/-_e" for line in (first, *more)) and more
    rows = table("name", "class", "number", right=["number"], fold=["name", "class"])
    rows.add_row("porter/builtin/tiny_flux/scheduler", "[red]FlowMatchEulerDiscreteScheduler[/]", "1234567.9e-12")
    console().print(rows)
    shown = capsys.readouterr().out
    assert "1234567.9e-12" in shown and max(map(len, shown.splitlines())) <= columns
    words = set(re.findall(r"[a-z]+|[A-Z][a-z]+", shown.split("─")[-1]))
    assert {"porter", "builtin", "tiny", "flux", "scheduler", "Flow", "Match", "Euler", "Scheduler"} <= words


def test_a_config_with_tables_is_shown_in_short(
    tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "m"))
    file = model / "tokenizer" / "tokenizer_config.json"
    words = {str(number): {"content": f"<{number}>", "lstrip": False} for number in range(400)}
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": words}))
    assert cli.main(["plan", str(model), "-v"]) == 0
    shown = capsys.readouterr().out
    assert 'added_tokens_decoder {"0": {"content": "<0>", "lstrip": false}' in shown and "<9>" not in shown


@pytest.mark.parametrize("size", ["24", "80000"])
def test_a_memory_size_lacks_its_unit(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux", "--device-memory", size]) == 2
    assert f"--device-memory {size}GB" in capsys.readouterr().err


def test_a_text_encoder_alone_assumes_no_picture(tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("text_encoder_2", "text_encoder_2/model.safetensors"):
        assert cli.main(["plan", str(tiny_flux / name), "--device-memory", "8GB"]) == 0
        shown = capsys.readouterr().out
        assert "1024" not in shown and "autoencoder" not in shown and "fits      yes" in shown


def test_markdown_for_a_pull_request(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux", "--markdown"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "## Port plan of `builtin:tiny-flux`", "| transformer | diffusers | `FluxTransformer2DModel` | 5.22 M | BF16 |",
        "`conversions.flux1.recipe:TRANSFORMER`", "### Risks",
        "```sh\nporter convert builtin:tiny-flux -o tiny-flux-port",
    ):  # fmt: skip
        assert words in shown, words
    assert cli.main(["plan", str(hostile(tmp_path, tiny_flux)), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "\n# Title" not in shown and "<script>" not in re.sub(r"(`+).*?\1", "", shown)
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (9, 5) for row in rows), rows
    assert cli.main(["plan", "builtin:tiny-flux", "--markdown", "--json"]) == 2
    capsys.readouterr()


def test_a_subfolder_alone(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_flux, tmp_path / "both" / "first")
    assert cli.main(["plan", str(tmp_path / "both"), "--subfolder", "first"]) == 0
    shown = capsys.readouterr().out
    assert "(first)" in shown and shown.splitlines()[-1].startswith("next") and "FluxPipeline" in shown


MEASURED = """
import sys
from pathlib import Path
from porter import cli
code = cli.main(["plan", sys.argv[1], "--json"])
heavy = {"torch", "diffusers", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
# Not ru_maxrss: a process inherits its parent's.
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(code, sorted(heavy), peak, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_real_sizes_take_little_memory_and_no_torch(kind: str, tmp_path: Path) -> None:
    """FLUX.1-dev as a folder of 33.7 GB and as one file of 23.8 GB; how long it takes is in `make bench`."""
    model = flux_folder(tmp_path / "FLUX.1-dev") if kind == "folder" else flux_file(tmp_path / "flux1-dev.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(model)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    code, heavy, peak = done.stderr.split()
    assert (code, heavy) == ("0", "[]") and int(peak) < 80 * 1024, done.stderr
    document = json.loads(done.stdout)
    part = next(part for part in document["components"] if part["name"] == "transformer")
    assert part["parameters"] == 11_901_408_320 and part["dtypes"] == {"BF16": 23_802_816_640}
    assert document["family"] == "flux1" and part["model"].startswith("FLUX.1-dev")


def test_nothing_a_model_says_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = [None, None, {"type_hint": ["diffusers", "UNet2DConditionModel"],
                          "pretrained_model_name_or_path": "a\x1b]0;x\x07\nrm -rf ~/b"}]  # fmt: skip
    (tmp_path / "modular_model_index.json").write_text(json.dumps({"_class_name": "P", "unet": entry}))
    for options in ([], ["-q"], ["-v"], ["--markdown"]):
        assert cli.main(["plan", str(tmp_path), *options]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "\x07" not in shown
        assert not any(line.strip().startswith("rm -rf") for line in shown.splitlines())
    for columns in ("0", "1", "99999999"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["plan", str(tmp_path)]) == 0
        assert "UNet2DConditionModel" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("options", [
    ["--dtype", "int8"], ["--dtype", ""], ["--dtype", "BF17"], ["--device-memory", "-5GB"], ["--height", "0"],
    ["--target", "nonsense"], ["--frames", "1000000000"],
])  # fmt: skip
def test_options_that_make_no_sense(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err
