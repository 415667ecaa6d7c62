"""Offload: the same numbers in every bit, with less of the model here at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from porter.core.errors import CheckpointError, UsageError
from runtime.compiled import blocks_of
from runtime.memory import device_of, using
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import load
from tests.conversions.wan.ports import write_port as write_wan
from tests.runtime.ports import write_port as write_flux

WAYS = ("component", "layer")
SMALL = {"height": 32, "width": 32, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def port_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a port folder, written once."""
    made: dict[str, Path] = {}

    def port(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("ports") / kind
            WRITERS[kind](folder)
            made[kind] = folder
        return made[kind]

    return port


WRITERS: dict[str, Callable[[Path], Any]] = {
    "flux": write_flux,
    "two denoisers": lambda folder: write_wan(folder, "a14b"),
}


@contextmanager
def watched(pipeline: ComposedPipelineBase) -> Iterator[dict[str, int]]:
    """The most bytes of real weights, of each component and of all together, at any call of any module."""
    parts = {name: module for name, module in pipeline.modules.items() if isinstance(module, nn.Module)}
    most = dict.fromkeys((*parts, "all"), 0)

    def look(*_: Any) -> None:
        found = {name: here(module) for name, module in parts.items()}
        for name, size in {**found, "all": sum(found.values())}.items():
            most[name] = max(most[name], size)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield most
    finally:
        handle.remove()


def here(module: nn.Module) -> int:
    """Bytes of a module's tensors that are real."""
    tensors: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values() if not t.is_meta)


def whole(module: nn.Module) -> int:
    """Bytes of all of a module's tensors."""
    tensors: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


def video(kind: str) -> dict[str, Any]:
    return {"num_frames": 5, "guidance_scale": 4.0, "guidance_scale_2": 2.5, "height": 32, "width": 32,
            "num_inference_steps": 4} if kind == "two denoisers" else SMALL  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRITERS)
def test_results_are_the_same_in_every_bit_and_less_is_here(
    kind: str, way: str, port_of: Callable[[str], Path]
) -> None:
    settings = video(kind)
    whole_one = load(port_of(kind), dtype=torch.float32, device="cpu")
    expected = [whole_one.generate("a red circle", seed=seed, **settings).output for seed in (0, 1)]
    pipeline = load(port_of(kind), dtype=torch.float32, device="cpu", offload=way)
    assert not pipeline.warnings
    sizes = {name: whole(part) for name, part in whole_one.modules.items() if isinstance(part, nn.Module)}
    tables = {name: here(part) for name, part in pipeline.modules.items() if isinstance(part, nn.Module)}
    assert sum(tables.values()) < 0.01 * sum(sizes.values())  # at rest: what is in no file
    with watched(pipeline) as most:
        found = [pipeline.generate("a red circle", seed=seed, **settings).output for seed in (0, 1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert {name: here(part) for name, part in pipeline.modules.items() if isinstance(part, nn.Module)} == tables
    # One component at a time, and nothing else than the others' tables.
    assert most["all"] <= max(sizes.values()) + sum(tables.values())
    for name, part in pipeline.modules.items():
        if isinstance(part, nn.Module):
            if way == "component":
                assert most[name] == sizes[name], name  # otherwise the figures above would show nothing
            elif len(blocks := blocks_of(part)) > 2:
                one = max(whole(block) for block in blocks)
                outside = sizes[name] - sum(whole(block) for block in blocks)
                assert most[name] <= outside + one, name  # the next one is still the fetcher's


def test_tied_tensors_are_one(port_of: Callable[[str], Path]) -> None:
    encoder = load(port_of("flux"), dtype=torch.float32, device="cpu", offload="component").modules["text_encoder_2"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert encoder.shared.weight.is_meta
    with using(encoder):
        assert not encoder.shared.weight.is_meta
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", WRITERS)
def test_half_precision_keeps_what_stays_float32(kind: str, dtype: torch.dtype, port_of: Callable[[str], Path]) -> None:
    whole_one = load(port_of(kind), dtype=dtype, device="cpu")
    pipeline = load(port_of(kind), dtype=dtype, device="cpu", offload="component")
    for name, part in whole_one.modules.items():
        if isinstance(part, nn.Module):
            parked = pipeline.modules[name]
            with using(parked):
                for key, tensor in part.state_dict().items():
                    assert torch.equal(parked.state_dict()[key], tensor), (name, key)
                    assert parked.state_dict()[key].dtype == tensor.dtype, (name, key)


def test_nested_uses_and_errors_leave_nothing_behind(port_of: Callable[[str], Path]) -> None:
    pipeline = load(port_of("flux"), dtype=torch.float32, device="cpu", offload="layer")
    model = pipeline.denoiser
    assert device_of(model) == torch.device("cpu")
    with pytest.raises(RuntimeError, match="stop"), using(model), using(model, None, "no module"):
        assert here(model)
        raise RuntimeError("stop")
    assert not here(model)

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = blocks_of(model)[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        pipeline.generate("a red circle", **SMALL)
    assert not here(model)
    handle.remove()
    assert pipeline.generate("a red circle", **SMALL).output is not None


def test_a_file_that_changes_meanwhile_is_named(port_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "port"
    write_flux(folder)
    pipeline = load(folder, dtype=torch.float32, device="cpu", offload="layer")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        pipeline.generate("a red circle", **SMALL)


def test_words_that_mean_nothing(port_of: Callable[[str], Path]) -> None:
    for options in ({"offload": "disk"}, {"weights": "int3", "quality": "lossy"}, {"weights": "fp8"}):
        with pytest.raises(UsageError):
            load(port_of("flux"), device="cpu", **options)
    with pytest.raises(UsageError, match="compile"):
        load(port_of("flux"), device="cpu", compiled=True, offload="layer")


def test_names_of_older_files_are_read_as_the_library_reads_them(
    port_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "port"
    write_flux(folder)
    file = folder / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    older = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in stored.items()}
    newer = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    made = []
    for tensors in (older, newer):
        save_file(tensors, file, metadata={"format": "pt"})
        pipeline = load(folder, dtype=torch.float32, device="cpu", offload="component")
        assert not pipeline.warnings
        assert not any(not parameter.is_meta for parameter in pipeline.modules["text_encoder"].parameters())
        made.append(pipeline.generate("a red circle", **SMALL).output)
    assert torch.equal(*made)


def test_an_encoder_with_other_tensors_stays_and_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "port"
    write_flux(folder)
    file = folder / "text_encoder_2" / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {"encoder.embed_tokens.weight": stored["shared.weight"].clone()}, file, {"format": "pt"})
    pipeline = load(folder, dtype=torch.float32, device="cpu", offload="component")
    assert [line for line in pipeline.warnings if line.startswith("text_encoder_2 stays on cpu")]
    assert here(pipeline.modules["text_encoder_2"])
    assert pipeline.generate("a red circle", **SMALL).output is not None
