"""`porter convert`: what it writes, what it refuses, what survives a kill, and the way back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from porter import cli
from porter.core.convert import convert
from porter.core.errors import BadInputError, CheckFailed, CheckpointError, ResourceError, UsageError
from porter.core.port import Port
from tests.hub_server import COMMIT, hub_server

ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def equal(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same tensors, byte for byte."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_diffusers_loads_the_port(tiny_port: Path) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(tiny_port, local_files_only=True)
    written = load_file(tiny_port / "transformer" / "diffusion_pytorch_model.safetensors")
    state = pipeline.transformer.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name].to(written[name].dtype), written[name]) for name in written)
    assert pipeline.vae.config.scaling_factor and pipeline.transformer.config.guidance_embeds is True


def test_the_manifest_accounts_for_every_file(tiny_port: Path, tiny_flux: Path) -> None:
    port = Port.open(tiny_port)
    files = tree(tiny_port)
    del files["manifest.json"]
    assert {name: record["sha256"] for name, record in port.manifest["files"].items()} == files
    assert port.stale(full=True) == [] and port.verdict() == "missing"
    source = port.manifest["source"]
    assert source["spec"] == "builtin:tiny-flux"
    for name in ("flux1-tiny.safetensors", "ae.safetensors", "text_encoder/model.safetensors"):
        assert source["files"][name]["sha256"] == hashlib.sha256((tiny_flux / name).read_bytes()).hexdigest()
    transformer = port.manifest["components"]["transformer"]
    assert transformer["sources"] == ["flux1-tiny.safetensors"] and len(transformer["recipe"]["digest"]) == 64
    assert transformer["coverage"]["totals"]["source"] == len(load_file(tiny_flux / "flux1-tiny.safetensors"))
    assert port.manifest["loss"] == {"exact": True, "dropped": [], "lossy": []}
    assert {name for name, part in port.manifest["components"].items() if part["action"] == "copy"} == {
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    }  # fmt: skip
    for name in ("tokenizer/vocab.json", "model_index.json", "text_encoder/model.safetensors"):
        assert files[name] == tree(tiny_flux)[name]


def test_tensor_hashes_in_the_manifest_are_those_of_the_tensors(tiny_port: Path) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors"
    recorded = Port.open(tiny_port).manifest["files"][name]["tensors"]
    tensors = load_file(tiny_port / name)
    assert recorded == {
        key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, tensor in tensors.items()
    }


def test_the_original_files_come_back(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(tiny_port), "--to", "original", "-o", str(tmp_path / "back"), "-q"]) == 0
    back, there = tree(tmp_path / "back"), tree(tiny_flux)
    assert back.keys() - {"manifest.json"} == there.keys()
    for name in there:
        if name in ("flux1-tiny.safetensors", "ae.safetensors"):
            assert equal(tmp_path / "back" / name, tiny_flux / name)
        else:
            assert back[name] == there[name], name
    with pytest.raises(BadInputError, match="original layout"):
        Port.open(tmp_path / "back")
    again = convert(tmp_path / "back", tmp_path / "again")
    assert again.manifest
    old = Port.open(tiny_port).manifest["files"]
    assert {name: record["sha256"] for name, record in again.manifest["files"].items()} == {
        name: record["sha256"] for name, record in old.items()
    }


def test_a_changed_port_is_not_taken_back(own_port: Path, tmp_path: Path) -> None:
    (own_port / "transformer" / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"changed since it was written: transformer/config\.json"):
        convert(own_port, tmp_path / "back", to="original")
    assert not (tmp_path / "back").exists()


def test_single_file_needs_the_config_and_gives_one_component(
    tiny_flux: Path, tiny_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(tiny_flux / "flux1-tiny.safetensors"), tmp_path / "out"
    assert cli.main(["convert", file, "-o", str(out)]) == 6
    refusal = capsys.readouterr().err
    assert "axes_dims_rope" in refusal and "--config" in refusal
    assert list(tmp_path.iterdir()) == []
    config = tiny_flux / "transformer" / "config.json"
    assert cli.main(["convert", file, "--config", str(config), "-o", str(out), "--verify", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verified"]["transformer"]["class"] == "diffusers.FluxTransformer2DModel"
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert sorted(tree(out)) == ["manifest.json", "transformer/config.json", name]
    assert tree(out)[name] == tree(tiny_port)[name]
    from diffusers import FluxTransformer2DModel

    assert FluxTransformer2DModel.from_pretrained(out / "transformer").config.axes_dims_rope == [8, 12, 12]


def test_a_config_that_contradicts_the_tensors_is_refused(tiny_flux: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_flux / "transformer" / "config.json").read_text())
    with pytest.raises(BadInputError, match="num_layers"):
        convert(tiny_flux / "flux1-tiny.safetensors", tmp_path / "out", config={**config, "num_layers": 3})
    with pytest.raises(UsageError, match="--component"):
        convert("builtin:tiny-flux", tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []


def test_one_component(tmp_path: Path, tiny_port: Path) -> None:
    convert("builtin:tiny-flux", tmp_path / "vae-only", component="vae")
    assert Port.open(tmp_path / "vae-only").components == ["vae"]
    mine, whole = tree(tmp_path / "vae-only"), tree(tiny_port)
    assert all(mine[name] == whole[name] for name in mine if name != "manifest.json")


def test_dtype(tmp_path: Path, tiny_port: Path) -> None:
    result = convert("builtin:tiny-flux", tmp_path / "wide", dtype="float32", component="vae", verify=True)
    wide = load_file(tmp_path / "wide" / "vae" / "diffusion_pytorch_model.safetensors")
    plain = load_file(tiny_port / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(wide[name].dtype == torch.float32 and torch.equal(wide[name], plain[name].float()) for name in plain)
    assert result.verified["vae"]["class"] == "diffusers.AutoencoderKL"
    narrow = convert("builtin:tiny-flux", tmp_path / "narrow", dtype="float16", component="vae")
    assert narrow.manifest and narrow.manifest["loss"]["exact"] is False and narrow.manifest["loss"]["lossy"]


def test_verify_loads_a_class_that_keeps_modules_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers would load such a class only with accelerate."""
    import diffusers

    monkeypatch.setattr(diffusers.AutoencoderKL, "_keep_in_fp32_modules", ["norm1"])
    result = convert("builtin:tiny-flux", tmp_path / "port", component="vae", verify=True)
    assert result.verified["vae"]["class"] == "diffusers.AutoencoderKL"


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_verify_sees_a_changed_byte(to: Any, tiny_port: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of the written file is flipped between writing and verifying, as a bad disk would."""
    from porter.core import staging

    record = staging.Staging.record

    def flip(self: staging.Staging, name: str, sha256: str, **more: Any) -> None:
        if name in ("vae/diffusion_pytorch_model.safetensors", "ae.safetensors"):
            with self.path(name).open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)
                file.seek(-1, 2)
                file.write(bytes([last[0] ^ 1]))
        record(self, name, sha256, **more)

    model: str | Path = "builtin:tiny-flux" if to == "diffusers" else tiny_port
    convert(model, tmp_path / "good", to=to, component="vae", verify=True)
    monkeypatch.setattr(staging.Staging, "record", flip)
    with pytest.raises(CheckFailed, match="other values"):
        convert(model, tmp_path / "out", to=to, component="vae", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_verify_sees_what_the_engine_does_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that its own way back undoes, or that no way back shows: torch's own ops know better."""
    from porter.core import execute, ops

    done = convert("builtin:tiny-flux", tmp_path / "good", dtype="float16", verify=True)
    assert all(found["computed"] == found["tensors"] for found in done.verified.values())
    with monkeypatch.context() as patched:
        patched.setattr(ops.PermuteBlocks, "move", lambda self, views: list(views))
        with pytest.raises(CheckFailed, match="torch makes of its source"):
            convert("builtin:tiny-flux", tmp_path / "swapped", component="transformer", verify=True)
    real = execute._converter
    monkeypatch.setattr(execute, "_converter", lambda old, new: _wrong(real(old, new)))
    with pytest.raises(CheckFailed, match="torch makes of its source"):
        convert("builtin:tiny-flux", tmp_path / "cast", dtype="float16", component="vae", verify=True)


def _wrong(convert_window: Any) -> Any:
    """A cast that gets the last bits wrong."""
    return lambda window: memoryview(bytes(byte ^ 1 for byte in convert_window(window)))


def test_dry_run_accounts_for_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "builtin:tiny-flux", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in ("double_blocks", "split", "swap halves", "exact", "nothing was"):
        assert word in shown
    assert cli.main(["convert", "builtin:tiny-flux", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"] and document["output"] is None
    assert [part["name"] for part in document["components"]] == ["transformer", "vae"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_at_the_real_size_takes_a_second(tmp_path: Path) -> None:
    """A sparse file with FLUX.1-dev's tensors: 23.8 GB that hold no byte on the disk."""
    from conversions.flux1.recipe import TRANSFORMER
    from porter.core.checkpoint import header_bytes

    config = {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56], "patch_size": 1, "out_channels": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = list(TRANSFORMER.source_headers(config, "BF16").values())
    with (tmp_path / "flux1-dev.safetensors").open("wb") as file:
        head = header_bytes(tensors, {})
        file.write(head)
        file.truncate(len(head) + sum(info.nbytes for info in tensors))
    assert (tmp_path / "flux1-dev.safetensors").stat().st_size > 23.8e9
    command = ["convert", str(tmp_path / "flux1-dev.safetensors"), "--config", str(tmp_path / "config.json")]
    began = time.perf_counter()
    done = porter(*command, "--dry-run", "--json")
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(done.stdout)["components"]
    assert part["coverage"]["totals"]["source"] == len(tensors) == 780
    assert part["bytes_in"] == part["bytes_out"] == 23_802_816_640
    assert seconds < 10, seconds  # about one alone; the bound is for a crowded runner


def porter(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "porter.cli", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_converting_imports_no_torch(tmp_path: Path) -> None:
    arguments = ["convert", "builtin:tiny-flux", "-o", str(tmp_path / "port")]
    code = (
        f"import sys; from porter.cli import main; code = main({arguments!r});"
        "print(code, [m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "0 []"


RECIPE = """
from conversions.flux1.recipe import TRANSFORMER
from porter.core.ops import PermuteBlocks
RECIPE = TRANSFORMER.replace_rule("final_layer.adaLN_modulation.1.{p:weight|bias}", ops=())
"""


def test_a_recipe_of_the_users_own(tmp_path: Path, tiny_port: Path, tiny_flux: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    out = tmp_path / "port"
    with pytest.raises(UsageError, match="--component"):
        cli_convert("builtin:tiny-flux", "--recipe", str(file), "-o", str(out))
    file.write_text(RECIPE + 'RECIPES = {"transformer": RECIPE}\n')
    cli_convert("builtin:tiny-flux", "--recipe", str(file), "-o", str(out))
    name = "transformer/diffusion_pytorch_model.safetensors"
    mine, usual = load_file(out / name), load_file(tiny_port / name)
    other = [key for key in usual if not torch.equal(mine[key], usual[key])]
    assert other == ["norm_out.linear.bias", "norm_out.linear.weight"]
    port = Port.open(out)
    assert port.manifest["components"]["transformer"]["recipe"]["reference"] == str(file)
    with pytest.raises(UsageError, match="not in the catalogue"):
        convert(out, tmp_path / "back", to="original")  # a manifest never names code that is run
    convert(out, tmp_path / "back", to="original", recipe=file)
    assert equal(tmp_path / "back" / "flux1-tiny.safetensors", tiny_flux / "flux1-tiny.safetensors")


def cli_convert(*arguments: str) -> None:
    """The verb itself, so that its errors can be looked at."""
    from porter.commands.convert import command

    command.main(["-q", *arguments], standalone_mode=False)


def test_a_manifest_cannot_name_code(own_port: Path, tmp_path: Path) -> None:
    """A port from a stranger: its manifest points at a module and at a file that would leave a mark."""
    evil = own_port / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for reference in (str(evil), "evil:RECIPE", "this:s", "conversions.flux1.recipe:THETA"):
        manifest = json.loads((own_port / "manifest.json").read_text())
        manifest["components"]["transformer"]["recipe"]["reference"] = reference
        (own_port / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UsageError, match="not in the catalogue"):
            convert(own_port, tmp_path / "back", to="original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["port"]


@pytest.mark.parametrize("name", ["..", "/etc/x.safetensors", "../../x.safetensors", ".hidden.safetensors", "vae"])
def test_a_manifest_cannot_choose_where_files_go(own_port: Path, tmp_path: Path, name: str) -> None:
    manifest = json.loads((own_port / "manifest.json").read_text())
    manifest["components"]["vae"]["sources"] = [name]
    (own_port / "manifest.json").write_text(json.dumps(manifest))
    convert(own_port, tmp_path / "back", to="original", component="vae")
    (weights,) = [path for path in tree(tmp_path / "back") if path.endswith(".safetensors")]
    assert weights in ("x.safetensors", "ae.safetensors") and sorted(p.name for p in tmp_path.iterdir()) == [
        "back",
        "port",
    ]


def test_hub_repository(tmp_path: Path, tiny_flux: Path, tiny_port: Path) -> None:
    """Dry run from remote headers alone, then the conversion through the hub's cache; byte for byte the local port."""
    shutil.copytree(tiny_flux, tmp_path / "hub" / "acme" / "tiny")
    with hub_server(tmp_path / "hub") as server:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        out = tmp_path / "port"
        for more in (["--dry-run"], ["--verify"]):
            command = [sys.executable, "-m", "porter.cli", "convert", "acme/tiny", "-o", str(out), "--json", *more]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
            assert done.returncode == 0, done.stderr
            if more == ["--dry-run"]:
                whole = [path for _, path, headers in server.requests if "/storage/" in path and "range" not in headers]
                assert whole == [] and not out.exists()
    assert json.loads(done.stdout)["verified"]["transformer"]["round_trip"] == 100
    mine, local = tree(out), tree(tiny_port)
    assert {k: v for k, v in mine.items() if k != "manifest.json"} == {
        k: v for k, v in local.items() if k != "manifest.json"
    }
    source = Port.open(out).manifest["source"]
    assert (source["spec"], source["kind"], source["revision"]) == ("acme/tiny", "hub", COMMIT)
    assert Port.open(out).manifest["licence"]["declared"] == {"license": "apache-2.0"}


# Interruption.


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


STOP_AFTER = """
import os, signal, sys
from porter.core import staging
record = staging.Staging.record
def stop(self, name, sha256, **more):
    record(self, name, sha256, **more)
    if name == sys.argv[1]:
        os.kill(os.getpid(), int(sys.argv[2]))
staging.Staging.record = stop
from porter.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_it_completes(tmp_path: Path, tiny_port: Path, number: int) -> None:
    out = tmp_path / "port"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    arguments = ["convert", "builtin:tiny-flux", "-o", str(out)]
    done = subprocess.run([sys.executable, "-c", STOP_AFTER, weights, str(int(number)), *arguments], cwd=ROOT)
    assert done.returncode in (-signal.SIGKILL, 130)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".port.partial-") and not out.exists()
    inode = (partial / weights).stat().st_ino
    (partial / "vae").mkdir(exist_ok=True)
    (partial / "vae" / "half-written.safetensors").write_bytes(b"junk")
    result = convert("builtin:tiny-flux", out)
    assert weights in result.resumed and (out / weights).stat().st_ino == inode
    assert {name: digest for name, digest in tree(out).items() if name != "manifest.json"} == {
        name: digest for name, digest in tree(tiny_port).items() if name != "manifest.json"
    }
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_killed_after_a_copy_still_names_every_source(tmp_path: Path, tiny_port: Path) -> None:
    out = tmp_path / "port"
    arguments = ["convert", "builtin:tiny-flux", "-o", str(out)]
    subprocess.run([sys.executable, "-c", STOP_AFTER, "scheduler/scheduler_config.json", "9", *arguments], cwd=ROOT)
    convert("builtin:tiny-flux", out)
    resumed, whole = (json.loads((port / "manifest.json").read_text()) for port in (out, tiny_port))
    assert resumed["source"]["files"] == whole["source"]["files"]


def test_two_files_of_one_component_are_refused(tmp_path: Path, tiny_flux: Path) -> None:
    """Both would be written to one place, and only one of them would arrive."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("flux1-one.safetensors", "flux1-two.safetensors"):
        shutil.copy(tiny_flux / "flux1-tiny.safetensors", model / name)
    config = json.loads((tiny_flux / "transformer" / "config.json").read_text())
    for component in (None, "transformer"):
        with pytest.raises(UsageError, match="more than once") as error:
            convert(model, tmp_path / "port", component=component, config=config)
        assert error.value.found == "flux1-one.safetensors, flux1-two.safetensors"


def test_what_a_killed_run_left_is_not_trusted_when_anything_changed(tmp_path: Path, tiny_flux: Path) -> None:
    model, out = Path(shutil.copytree(tiny_flux, tmp_path / "model")), tmp_path / "out" / "port"
    out.parent.mkdir()
    weights = "vae/diffusion_pytorch_model.safetensors"
    arguments = ["convert", str(model), "-o", str(out)]
    subprocess.run([sys.executable, "-c", STOP_AFTER, weights, "9", *arguments], cwd=ROOT)
    (partial,) = out.parent.iterdir()
    with (partial / "transformer" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"!")  # a file that was finished, then damaged
    tensors = load_file(model / "ae.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, model / "ae.safetensors")  # another source: another job
    result = convert(model, out)
    assert result.resumed == () and list(out.parent.iterdir()) == [out]
    assert Port.open(out).stale(full=True) == []


def test_a_damaged_finished_file_is_written_again(tmp_path: Path, tiny_port: Path) -> None:
    out = tmp_path / "port"
    name = "transformer/diffusion_pytorch_model.safetensors"
    arguments = ["convert", "builtin:tiny-flux", "-o", str(out)]
    subprocess.run([sys.executable, "-c", STOP_AFTER, name, "9", *arguments], cwd=ROOT)
    (partial,) = tmp_path.iterdir()
    os.utime(partial / name, ns=(1, 1))
    result = convert("builtin:tiny-flux", out)
    assert name not in result.resumed and tree(out)[name] == tree(tiny_port)[name]


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    """The first is stopped in the middle of its work; the second is refused and takes nothing away."""
    out = tmp_path / "port"
    arguments = ["convert", "builtin:tiny-flux", "-o", str(out)]
    command = [sys.executable, "-c", STOP_AFTER, "transformer/config.json", str(int(signal.SIGSTOP)), *arguments]
    with subprocess.Popen(command, cwd=ROOT) as first:
        try:
            wait_for(lambda: list(tmp_path.glob(".port.partial-*/transformer/config.json")))
            with pytest.raises(ResourceError, match="another process is writing"):
                convert("builtin:tiny-flux", out)
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert Port.open(out).stale(full=True) == []


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path, tiny_flux: Path) -> None:
    model, out = Path(shutil.copytree(tiny_flux, tmp_path / "model")), tmp_path / "port"

    def meddle(name: str, _: int) -> None:
        if name == "vae/diffusion_pytorch_model.safetensors":
            os.utime(model / "flux1-tiny.safetensors", ns=(1, 1))

    with pytest.raises(BadInputError, match=r"flux1-tiny\.safetensors changed while"):
        convert(model, out, progress=meddle)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("how", ["written", "replaced", "gone"])
@pytest.mark.parametrize("name", ["flux1-tiny.safetensors", "text_encoder/model.safetensors"])
def test_a_time_that_is_set_back_hides_no_change(name: str, how: str, tmp_path: Path, tiny_flux: Path) -> None:
    """Of what is converted and of what is copied: part of the old content would stand beside part of the new."""
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    file, done = model / name, list[str]()
    state, content = file.stat(), file.read_bytes()

    def meddle(written: str, _: int) -> None:
        if written.startswith("vae/") and not done:
            done.append(how)
            if how == "gone":
                file.unlink()
                return
            target = file if how == "written" else tmp_path / "other"
            target.write_bytes(content[:-9] + bytes(9))
            os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
            target.replace(file)

    with pytest.raises(BadInputError, match=rf"(?s)changed while|cannot read .*{file.name}"):
        convert(model, tmp_path / "port", progress=meddle)
    assert done and list(tmp_path.iterdir()) == [model]


def test_a_file_that_was_only_touched_is_the_same(tmp_path: Path, tiny_flux: Path) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    convert(model, tmp_path / "port", progress=lambda *_: (model / "flux1-tiny.safetensors").chmod(0o640))
    assert Port.open(tmp_path / "port").stale(full=True) == []


def test_an_interrupted_run_is_not_continued_from_another_file_of_one_time(tmp_path: Path, tiny_flux: Path) -> None:
    """Archives and build tools give all files one time: a fine-tune of the same size would be mixed with the first."""
    model, out = Path(shutil.copytree(tiny_flux, tmp_path / "model")), tmp_path / "port"
    file = model / "flux1-tiny.safetensors"
    os.utime(file, ns=(10**9, 10**9))
    arguments = ["convert", str(model), "-o", str(out)]
    subprocess.run([sys.executable, "-c", STOP_AFTER, "vae/config.json", "9", *arguments], cwd=ROOT)
    assert list(tmp_path.glob(".port.partial-*/transformer/*.safetensors"))
    content = file.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(content[:-9] + bytes(9))
    os.utime(other, ns=(10**9, 10**9))
    other.replace(file)
    assert convert(model, out).resumed == ()
    convert(model, tmp_path / "undisturbed")
    found, wanted = tree(out), tree(tmp_path / "undisturbed")
    assert {**found, "manifest.json": ""} == {**wanted, "manifest.json": ""}


@pytest.mark.parametrize("gone", ["flux1-tiny.safetensors", "text_encoder/model.safetensors"])
def test_a_source_that_cannot_be_read_is_not_blamed_on_the_output(gone: str, tmp_path: Path, tiny_flux: Path) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    with pytest.raises(BadInputError, match=rf"cannot read .*{Path(gone).name}") as error:
        convert(model, tmp_path / "port", started=lambda _: (model / gone).unlink())
    assert error.value.hint and list(tmp_path.iterdir()) == [model]


def test_a_read_error_is_named(tmp_path: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CheckpointError, match="cannot read") as error:
        convert(model, tmp_path / "port")
    assert error.value.found == "Input/output error" and error.value.hint
    assert list(tmp_path.iterdir()) == [model]


def test_a_source_that_changes_after_it_was_planned_is_noticed(tmp_path: Path, tiny_flux: Path) -> None:
    """The same names, shapes and size, other places: what was planned would read other tensors' bytes."""
    model, out = Path(shutil.copytree(tiny_flux, tmp_path / "model")), tmp_path / "port"
    file = model / "flux1-tiny.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])

    def meddle(_: int) -> None:
        one, other = (f"double_blocks.0.img_attn.norm.{kind}_norm.scale" for kind in ("query", "key"))
        header[one], header[other] = header[other], header[one]
        text = json.dumps(header, separators=(",", ":")).encode()
        with file.open("r+b") as opened:
            opened.seek(8)
            opened.write(text.ljust(size))

    with pytest.raises(BadInputError, match=r"is no longer in its file as the header said"):
        convert(model, out, started=meddle)
    assert list(tmp_path.iterdir()) == [model]


# Replacing, and the disk.


def test_a_second_run_that_meets_the_first_at_its_end_takes_nothing_away(tmp_path: Path) -> None:
    """The first is stopped just before the folder gets its name; it still holds the lock then."""
    out = tmp_path / "port"
    stop = STOP_AFTER.replace("staging.Staging.record = stop", PUBLISH_STOP)
    command = [sys.executable, "-c", stop, "", str(int(signal.SIGSTOP)), "convert", "builtin:tiny-flux", "-o", str(out)]
    with subprocess.Popen(command, cwd=ROOT) as first:
        try:
            wait_for(lambda: "State:\tT" in Path(f"/proc/{first.pid}/status").read_text())
            with pytest.raises(ResourceError, match="another process is writing"):
                convert("builtin:tiny-flux", out)
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert Port.open(out).stale(full=True) == []
    assert [path.name for path in tmp_path.iterdir()] == ["port"] and not (out / ".lock").exists()


PUBLISH_STOP = """
real = staging.fsync_folder
def fsync(folder):
    if folder.name.startswith(".port.partial"):
        os.kill(os.getpid(), int(sys.argv[2]))
    real(folder)
staging.fsync_folder = fsync
"""


def test_overwrite_replaces_ports_only(tmp_path: Path, tiny_port: Path) -> None:
    out = tmp_path / "port"
    convert("builtin:tiny-flux", out, component="vae")
    with pytest.raises(UsageError, match="exists"):
        convert("builtin:tiny-flux", out)
    assert Port.open(out).components == ["vae"]
    convert("builtin:tiny-flux", out, overwrite=True)
    assert len(Port.open(out).components) == 7
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="no port"):
        convert("builtin:tiny-flux", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"


def test_overwrite_through_a_link_leaves_nothing_beside_it(tmp_path: Path, tiny_port: Path) -> None:
    (tmp_path / "real").mkdir()
    shutil.copytree(tiny_port, tmp_path / "real" / "port")
    (tmp_path / "port").symlink_to(tmp_path / "real" / "port")
    convert("builtin:tiny-flux", tmp_path / "port", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["port", "real"]
    assert not (tmp_path / "port").is_symlink() and Port.open(tmp_path / "port").stale(full=True) == []


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "port"

    def appear(*_: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(UsageError, match="the output exists"):
        convert("builtin:tiny-flux", out, progress=appear)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_failed_overwrite_keeps_the_old_port(tmp_path: Path, tiny_flux: Path) -> None:
    out = tmp_path / "port"
    convert("builtin:tiny-flux", out, component="vae")
    before = tree(out)
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    tensors = load_file(model / "ae.safetensors")
    tensors.popitem()
    save_file(tensors, model / "ae.safetensors")
    with pytest.raises(BadInputError):
        convert(model, out, overwrite=True)
    assert tree(out) == before and sorted(path.name for path in tmp_path.iterdir()) == ["model", "port"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    from porter.core import staging

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5_000_000, hard)
    )  # the kernel refuses to write more, as a full disk does
    try:
        with pytest.raises(ResourceError) as caught:
            convert("builtin:tiny-flux", tmp_path / "port")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.hint and list(tmp_path.iterdir()) == []
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ResourceError, match="not enough space"):
        convert("builtin:tiny-flux", tmp_path / "deep" / "port")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_and_the_licence_come_along(tmp_path: Path, tiny_flux: Path) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-terms\n---\n# Tiny\n")
    (model / "LICENSE.md").write_text("terms")
    (model / "notes.txt").write_text("x")
    (model / "transformer" / "model.py").write_text("raise SystemExit")
    result = convert(model, tmp_path / "port")
    assert result.manifest
    licence = result.manifest["licence"]
    assert licence["declared"] == {"license": "other", "license_name": "tiny-terms"}
    assert licence["files"] == ["LICENSE.md", "README.md"] and "licence" in licence["hint"]
    assert set(result.manifest["not_carried"]) == {"notes.txt", "transformer/model.py"}
    assert not (tmp_path / "port" / "notes.txt").exists()
