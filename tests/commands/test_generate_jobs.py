"""`porter generate` beyond one prompt: prompt files, batches, formats, repetition, previews, executors, bad options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from porter.cli import main
from porter.core.port import file_sha256
from runtime.image import read_metadata
from tests.runtime.ports import write_port

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("jobs") / "port")


def generate(port: Path, *arguments: object) -> int:
    return main(["generate", str(port), *map(str, arguments)])


def pixels(path: Path) -> str:
    return str(read_metadata(path)["pixels_sha256"])


def test_a_prompt_file_with_settings_of_its_own(port: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "red", "seed": 5},
        {"prompt": "blue", "name": "blue", "height": 48, "num_inference_steps": 1},
        {"prompt": "green", "guidance_scale": 0.0},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    out = tmp_path / "out"
    assert generate(port, "--prompts", tmp_path / "p.jsonl", "--steps", 2, "--seed", 9, "-o", out) == 0
    names = ["00000-red-seed5.png", "blue.png", "00002-green-seed9.png"]
    assert sorted(p.name for p in out.glob("*.png")) == sorted(names)
    about = [read_metadata(out / name) for name in names]
    assert [a["seed"] for a in about] == [5, 9, 9]
    assert [a["num_inference_steps"] for a in about] == [2, 1, 2]
    assert [a["height"] for a in about] == [64, 48, 64] and about[2]["guidance_scale"] == 0
    assert generate(port, "red", "--seed", 5, "--steps", 2, "-o", tmp_path / "alone.png") == 0
    assert pixels(tmp_path / "alone.png") == about[0]["pixels_sha256"]


def test_batches_give_the_same_noise_whatever_their_size(port: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("red\nblue\ngreen\n")
    levels = []
    for size in (1, 2, 3):
        out = tmp_path / str(size)
        assert generate(port, "--prompts", tmp_path / "p.txt", "--steps", 2, "--batch-size", size, "-o", out) == 0
        files = sorted(out.glob("*.png"))
        assert [read_metadata(f)["batch_size"] for f in files] == {1: [1] * 3, 2: [2, 2, 1], 3: [3] * 3}[size]
        levels.append([list(Image.open(f).tobytes()) for f in files])
    for other in levels[1:]:
        for a, b in zip(levels[0], other, strict=True):
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1  # rounding, at most one level


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_result_repeats_itself_from_its_file_and_from_its_sidecar(port: Path, tmp_path: Path, kind: str) -> None:
    first = tmp_path / f"first.{kind}"
    options = ("--seed", 7, "--steps", 2, "--guidance-scale", 0, "--width", 96, "--negative-prompt", "b",
               "--true-cfg-scale", 2, "--quality", "exact")  # fmt: skip
    assert generate(port, "ä large <red> circle", *options, "-o", first) == 0
    again, third = tmp_path / f"again.{kind}", tmp_path / f"third.{kind}"
    assert generate(port, "--from-metadata", first, "-o", again) == 0
    assert generate(port, "--from-metadata", first.with_suffix(".json"), "-o", third) == 0
    assert pixels(first) == pixels(again) == pixels(third)
    assert first.read_bytes() == again.read_bytes()  # all settings too
    assert read_metadata(again)["quality"] == "exact"
    other = tmp_path / f"other.{kind}"
    assert generate(port, "--from-metadata", first, "--seed", 8, "-o", other) == 0
    assert pixels(other) != pixels(first) and read_metadata(other)["seed"] == 8


def test_what_differs_from_the_repeated_result_is_said(
    port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.png"
    assert generate(port, PROMPT, "--steps", 1, "-o", first) == 0
    sidecar = first.with_suffix(".json")
    about = json.loads(sidecar.read_text())
    about["versions"]["torch"], about["batch_size"] = "1.0", 4
    sidecar.write_text(json.dumps(about))
    capfd.readouterr()
    assert generate(port, "--from-metadata", sidecar, "-o", tmp_path / "again.png") == 0
    said = capfd.readouterr().err
    assert "another torch: 1.0" in said and "batch of 4" in said
    about["given"] = {"image.0": {"name": "cat.png", "pixels_sha256": "0"}}
    sidecar.write_text(json.dumps(about))
    assert generate(port, "--from-metadata", sidecar, "-o", tmp_path / "more.png") == 2
    assert "cat.png" in capfd.readouterr().err


def test_diffusers_executor_gives_diffusers_own_pixels(port: Path, tmp_path: Path) -> None:
    for executor in ("diffusers", "native"):
        out = tmp_path / f"{executor}.png"
        options = ("--height", 64, "--width", 64, "--steps", 2, "--quality", "exact", "--executor", executor)
        assert generate(port, PROMPT, *options, "--max-sequence-length", 32, "-o", out) == 0
        assert read_metadata(out)["executor"] == executor
    assert pixels(tmp_path / "diffusers.png") == pixels(tmp_path / "native.png")


def test_previews_are_there_while_it_runs_and_gone_afterwards(port: Path, tmp_path: Path) -> None:
    from runtime.outputs import Target
    from runtime.preview import previewing
    from runtime.registry import load
    from runtime.request import Req

    target = Target(tmp_path / "a.png", None)
    pipeline, seen = load(port, device="cpu"), list[tuple[int, int]]()
    batch = Req(prompt=PROMPT, num_inference_steps=4)
    with previewing(pipeline, batch, [target], 1):

        def look(name: str, tensors: Any) -> None:
            if name.startswith("denoising.step.") and target.preview.exists():
                with Image.open(target.preview) as shown:
                    seen.append(shown.size)

        batch.taps.append(look)
        pipeline.forward(batch)
    assert seen == [(64, 64)] * 4  # after three steps; the last one shows the third's
    assert list(tmp_path.iterdir()) == []


def test_another_scheduler_of_the_same_kind(port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(port, PROMPT, "--steps", 3, "-o", tmp_path / "a.png") == 0
    assert "schedule of its own" not in capfd.readouterr().err
    name = "FlowMatchHeunDiscreteScheduler"
    assert generate(port, PROMPT, "--steps", 3, "--scheduler", name, "-o", tmp_path / "b.png") == 0
    assert f"{name} has a schedule of its own: it takes no mu and no sigmas" in capfd.readouterr().err
    assert read_metadata(tmp_path / "a.png")["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert read_metadata(tmp_path / "b.png")["scheduler"] == name
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")


def no_lines(path: Path) -> None:
    path.write_text("\n\n")


def bad_key(path: Path) -> None:
    path.write_text('{"prompt": "a", "colour": "red"}\n')


def bad_json(path: Path) -> None:
    path.write_text('{"prompt": "a"}\n{"prompt": \n')


def latin(path: Path) -> None:
    path.write_bytes("rød".encode("latin-1"))


def escaping(path: Path) -> None:
    path.write_text('{"prompt": "a", "name": "../../x"}\n')


@pytest.mark.parametrize(
    ("make", "says"),
    [(no_lines, "0 prompts"), (bad_key, "colour"), (bad_json, ":2 is not JSON"), (latin, "UTF-8"), (escaping, "name")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_prompt_file_that_is_wrong_is_refused_by_line(
    port: Path, tmp_path: Path, make: Callable[[Path], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "p.jsonl")
    assert generate(port, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "out") == 6
    assert says in capfd.readouterr().err and not (tmp_path / "out").exists()


BAD: dict[str, tuple[tuple[object, ...], int, str]] = {
    "two ways": ((PROMPT, "--prompts", "x.txt"), 2, "once"),
    "nothing asked": ((), 2, "once"),
    "no such prompt file": (("--prompts", "none.txt"), 4, "none.txt"),
    "no such metadata": (("--from-metadata", "none.png"), 4, "none.png"),
    "unknown scheduler": ((PROMPT, "--scheduler", "FlowMatchOilerScheduler"), 2, "FlowMatchEulerDiscreteScheduler"),
    "scheduler of another kind": ((PROMPT, "--scheduler", "DDIMScheduler"), 2, "DDIMScheduler"),
    "no scheduler at all": ((PROMPT, "--scheduler", "FluxPipeline"), 2, "unknown scheduler"),
    "unknown attention": ((PROMPT, "--attention", "warp"), 2, "sdpa"),
    "unknown setting": ((PROMPT, "--set", "colour=red"), 2, "colour"),
    "setting without a name": ((PROMPT, "--set", "=3"), 2, "NAME=VALUE"),
    "no such picture": ((PROMPT, "--image", "none.png"), 4, "none.png"),
    "a picture that it does not take": ((PROMPT, "--image", "PICTURE"), 2, "image"),
    "a mask that it does not take": ((PROMPT, "--mask", "PICTURE"), 2, "mask_image"),
    "frames": ((PROMPT, "--num-frames", 5), 2, "num_frames"),
    "video format": ((PROMPT, "--format", "mp4"), 2, "pictures, not videos"),
    "name of another format": ((PROMPT, "--format", "webp", "-o", "a.png"), 2, ".webp"),
    "processes without torchrun": ((PROMPT, "--tp", 2), 2, "torchrun --nproc-per-node 2"),
    "diffusers on several processes": ((PROMPT, "--executor", "diffusers", "--ring", 2), 2, "torchrun"),
    "LoRA that is not there": ((PROMPT, "--lora", "none.safetensors"), 4, "none.safetensors"),
    "LoRA scale": ((PROMPT, "--lora", "x.safetensors:nan"), 2, "scale"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_options(
    port: Path, tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, says = BAD[case]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "PICTURE", "PNG")
    assert generate(port, *arguments) == code
    shown = capfd.readouterr()
    assert says in shown.err and "Traceback" not in shown.err and not shown.out
    assert [p.name for p in tmp_path.iterdir()] == ["PICTURE"]  # nothing half made


def test_metadata_that_is_not_ours_is_refused(port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "x.json").write_text('{"schema": "porter.image/1", "prompt": 3}')
    (tmp_path / "y.json").write_text("[1")
    for name in ("plain.png", "x.json", "y.json"):
        assert generate(port, "--from-metadata", tmp_path / name, "-o", tmp_path / "out.png") == 6
        assert name in capfd.readouterr().err


def test_two_processes_make_the_same_picture_once(port: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "porter.cli"]
    command = ["generate", str(port), PROMPT, "--steps", "2", "--ring", "2", "--json", "-o", str(tmp_path / "two.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["parallel"] == {"ring": 2} and done.stderr.count("no manifest.json") == 1
    assert file_sha256(tmp_path / "two.png") == document["images"][0]["file_sha256"]
    assert generate(port, PROMPT, "--steps", 2, "-o", tmp_path / "one.png") == 0
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)) <= 1


def test_ctrl_c_leaves_nothing_half_made(port: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    command = [sys.executable, "-m", "porter.cli", "generate", str(port), PROMPT, "--steps", "100000", "--preview", "1"]
    process = subprocess.Popen(
        [*command, "-o", str(out)], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(600):
        if (tmp_path / "out.preview.png").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
