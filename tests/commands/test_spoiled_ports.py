"""Ports that were damaged, or made to harm: each verb says so with its code, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from porter.cli import main
from tests.repeated import some

VAE, CLIP, SCHEDULER = "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Spoil = Callable[[Path], object]


def edit(name: str, **changes: Any) -> Spoil:
    """Change keys of a JSON file; None takes a key away."""

    def do(port: Path) -> None:
        document = json.loads((port / name).read_text()) | changes
        (port / name).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return do


def manifest(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def do(port: Path) -> None:
        document = json.loads((port / "manifest.json").read_text())
        change(document)
        (port / "manifest.json").write_text(json.dumps(document))

    return do


def weights(component: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def do(port: Path) -> None:
        tensors = load_file(port / component / WEIGHTS)
        change(tensors)
        save_file(tensors, port / component / WEIGHTS)

    return do


def cut(name: str) -> Spoil:
    return lambda port: (port / name).write_bytes((port / name).read_bytes()[:-9])


# name → (what is done, what `parity` and `generate` end in, words of the message)
SPOILS: dict[str, tuple[Spoil, int, str]] = {
    "vae-truncated": (cut(f"vae/{WEIGHTS}"), 6, "truncated"),
    "vae-missing": (lambda p: (p / "vae" / WEIGHTS).unlink(), 6, "no weights"),
    "vae-extra-tensor": (weights("vae", lambda t: t.update(more=t["decoder.conv_in.bias"].clone())), 6, "more"),
    "vae-wrong-shape": (
        weights("vae", lambda t: t.update({"decoder.conv_in.bias": t["decoder.conv_in.bias"][1:].clone()})), 6,
        "decoder.conv_in.bias",
    ),
    "vae-config-no-json": (lambda p: (p / VAE).write_text("{"), 6, "vae/config.json"),
    "vae-config-empty": (lambda p: (p / VAE).write_text("{}"), 6, "vae"),
    "vae-config-words": (edit(VAE, block_out_channels="x"), 6, "vae"),
    "vae-config-other-widths": (edit(VAE, block_out_channels=[32, 64, 128]), 6, "do not fill"),
    "vae-config-endless": (edit(VAE, layers_per_block=10**9), 6, "layers_per_block"),
    "transformer-config-missing": (
        lambda p: (p / "transformer" / "config.json").unlink(), 4, "transformer/config.json",
    ),
    "transformer-no-heads": (edit("transformer/config.json", num_attention_heads=0), 6, "transformer"),
    "clip-no-heads": (edit(CLIP, num_attention_heads=0), 6, "does not run"),
    "clip-truncated": (cut("text_encoder/model.safetensors"), 6, "text_encoder"),
    "scheduler-divides-by-zero": (edit(SCHEDULER, base_image_seq_len=256, max_image_seq_len=256), 6, "does not run"),
    "scheduler-of-another-kind": (
        edit("model_index.json", scheduler=["diffusers", "DDPMScheduler"]), 6, "does not run",
    ),
    "tokenizer-no-json": (lambda p: (p / "tokenizer_2" / "tokenizer.json").write_text("{"), 6, "tokenizer_2"),
    "vae-scale-zero": (edit(VAE, scaling_factor=0), 1, "not finite"),
    "vae-not-a-number": (weights("vae", lambda t: [v.fill_(float("nan")) for v in t.values()]), 1, "not finite"),
    "unknown-class": (edit("model_index.json", vae=["diffusers", "AutoencoderXYZ"]), 6, "AutoencoderXYZ"),
    "foreign-library": (edit("model_index.json", vae=["os", "system"]), 6, "os.system"),
    "manifest-family-is-a-list": (manifest(lambda d: d.update(family=["x"])), 6, "family"),
    "manifest-names-no-sources": (manifest(lambda d: d["source"].pop("files")), 6, "source"),
    "manifest-leaves-the-folder": (manifest(lambda d: d["files"].update({"../x": {}})), 6, "files"),
    "manifest-with-a-nul": (manifest(lambda d: d["files"].update({"a\0": {}})), 6, "files"),
    "manifest-with-half-a-character": (manifest(lambda d: d["source"].update(spec="\ud800")), 6, "manifest.json"),
    "manifest-is-endless-nesting": (lambda p: (p / "manifest.json").write_text("[" * 100_000), 6, "manifest.json"),
}  # fmt: skip
# Only one of the two verbs reads these files.
ONLY_GENERATE = {"unknown-class", "foreign-library", "vae-scale-zero", "vae-not-a-number"}
# diffusers does not run them, and a comparison that did not happen is a failed check.
FAILED_CHECK = {"scheduler-divides-by-zero", "scheduler-of-another-kind", "tokenizer-no-json"}


@pytest.mark.parametrize("name", some(SPOILS, 8))
def test_parity_and_generate_of_a_spoiled_port(
    name: str, own_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code, words = SPOILS[name]
    spoil(own_port)
    before = sorted(tmp_path.rglob("*"))
    verbs = [["generate", str(own_port), "a red circle", "--steps", "1", "-o", str(tmp_path / "x.png")]]
    if name not in ONLY_GENERATE:
        verbs.append(["parity", str(own_port), "--steps", "1", "-o", str(tmp_path / "report")])
    for arguments in verbs:
        found = main(arguments)
        told = capsys.readouterr().err
        failed = name in FAILED_CHECK and arguments[0] == "parity"
        assert found == (1 if failed else code), (arguments[0], told)
        if failed:
            continue
        assert words in told and "next:" in told and "internal error" not in told, (arguments[0], told)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("spoil", [
    manifest(lambda d: d.pop("family")),
    manifest(lambda d: d.update(licence="x")),
    manifest(lambda d: d["components"]["vae"].update(sources=[1])),
    manifest(lambda d: d["components"]["vae"].update(source_dtypes={"a": "BF16"})),
    manifest(lambda d: d["components"]["vae"].update(dtype=3)),
    manifest(lambda d: d["components"]["vae"]["config"].clear()),
    manifest(lambda d: d["components"]["vae"]["config"].update(layers_per_block=10**9)),
    manifest(lambda d: d["components"]["vae"]["config"].update(latent_channels="x")),
    manifest(lambda d: d["components"]["vae"].update(recipe=d["components"]["transformer"]["recipe"])),
])  # fmt: skip
def test_the_way_back_from_a_spoiled_manifest(
    spoil: Spoil, own_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may succeed (a family's name only gives the file its usual name); it may not fail by accident."""
    spoil(own_port)
    found = main(["convert", str(own_port), "--to", "original", "-o", str(tmp_path / "back")])
    told = capsys.readouterr().err
    assert found in (0, 6) and "internal error" not in told, told
    assert (tmp_path / "back").exists() == (found == 0)


@pytest.mark.slow
def test_a_folder_where_the_verdict_belongs(own_port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_port / "parity" / "parity.json").mkdir(parents=True)
    assert main(["parity", str(own_port), "--steps", "1"]) == 5
    assert "parity.json is a folder" in capsys.readouterr().err
    assert [path.name for path in (own_port / "parity").iterdir()] == ["parity.json"]
