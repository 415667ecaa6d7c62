"""The native Z-Image transformer against diffusers' class, which takes lists of images and captions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from conversions.z_image.model import ZImageParams, ZImageTransformer
from conversions.z_image.places import Places, places
from parity.recorder import float64
from porter.core.errors import BadInputError, UsageError
from runtime.attention import attention_backend
from runtime.loader import packed
from runtime.quality import at_quality

ROUNDING = 1.5e-6  # times max |reference|, float32
TINY: dict[str, Any] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 3,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 20,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [4, 6, 6],
    "axes_lens": [130, 16, 16],
}
Batch = tuple[Tensor, Tensor, list[Tensor]]  # latents (B, C, H, W), times (B,), captions


def diffusers_model(**changes: Any) -> Any:
    """diffusers' transformer with every parameter away from 0 and 1."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def native_like(reference: nn.Module, **changes: Any) -> ZImageTransformer:
    model = ZImageTransformer.from_config(TINY | changes).eval()
    model.load_state_dict(packed(ZImageTransformer, TINY | changes, reference.state_dict()), strict=True)
    return model


def batch(lengths: tuple[int, ...], size: tuple[int, int] = (10, 14), dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(sum(lengths))
    latents = torch.randn(len(lengths), 3, *size, generator=draw).to(dtype)
    captions = [torch.randn(length, 20, generator=draw).to(dtype) for length in lengths]
    return latents, torch.rand(len(lengths), generator=draw), captions


def caption_mask(captions: list[Tensor]) -> Tensor:
    """bool (B, T), True for a caption's tokens."""
    return pad_sequence([torch.ones(len(c), dtype=torch.bool) for c in captions], batch_first=True)


@torch.no_grad()
def theirs(reference: nn.Module, given: Batch) -> Tensor:
    """Lists of images with one frame, and of captions; the answer (B, C, H, W)."""
    latents, time, captions = given
    return torch.cat(reference(list(latents.unsqueeze(2)), time, captions, return_dict=False)[0], dim=1).transpose(0, 1)


@torch.no_grad()
def ours(native: nn.Module, given: Batch) -> Tensor:
    latents, time, captions = given
    answer: Tensor = native(latents, time, pad_sequence(captions, batch_first=True), caption_mask(captions))
    return answer


def gap(native: nn.Module, reference: nn.Module, given: Batch) -> float:
    """max |difference| over max |reference|."""
    expected = theirs(reference, given)
    return float((ours(native, given) - expected).abs().max() / expected.abs().max())


BATCHES = {
    "one": batch((7,)),
    "filled up": batch((32,), (8, 16)),
    "same lengths": batch((9, 9), (8, 8)),
    "filled to one length": batch((35, 50)),
    "masked": batch((5, 70, 33), (16, 8)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no norm of q and k": {"qk_norm": False},
    "other numbers": {"norm_eps": 1e-2, "rope_theta": 10.0, "t_scale": 17.0, "n_refiner_layers": 1},
    "wide": {"dim": 264, "n_heads": 11, "n_kv_heads": 11, "axes_dims": [8, 8, 8]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_equals_diffusers_lists(name: str) -> None:
    reference = diffusers_model()
    assert gap(native_like(reference), reference, BATCHES[name]) < ROUNDING


@pytest.mark.parametrize("name", VARIANTS)
def test_the_difference_is_rounding(name: str) -> None:
    """It falls a thousand times in float64."""
    reference = diffusers_model(**VARIANTS[name])
    native, given = native_like(reference, **VARIANTS[name]), BATCHES["masked"]
    assert gap(native, reference, given) < ROUNDING
    with float64(native, reference):
        exact = batch((5, 70, 33), (16, 8), torch.float64)
        assert gap(native, reference, exact) < 1e-3 * ROUNDING


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_exact_is_the_arithmetic_of_diffusers_in_every_bit(name: str, dtype: torch.dtype) -> None:
    reference = diffusers_model()
    native = native_like(reference).to(dtype)
    latents, time, captions = BATCHES[name]
    given = latents.to(dtype), time, [caption.to(dtype) for caption in captions]
    with at_quality("exact"):
        answer = ours(native, given)
    assert answer.dtype == dtype
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(answer, theirs(reference, given))


@pytest.mark.parametrize("name", ["math", "flash", "flex"])
def test_other_kernels_compute_the_same(name: str) -> None:
    native = native_like(diffusers_model())
    given = BATCHES["filled to one length"]
    expected = ours(native, given)
    with attention_backend(name, native.supported_attention_backends):
        assert (ours(native, given) - expected).abs().max() < 3 * ROUNDING * expected.abs().max()
        if name == "flash":  # takes no masks, and captions filled to different lengths need one
            with pytest.raises(UsageError, match="takes no mask"):
                ours(native, BATCHES["masked"])


def test_bfloat16_stays_near() -> None:
    native = native_like(diffusers_model())
    latents, time, captions = BATCHES["masked"]
    half = latents.bfloat16(), time, [caption.bfloat16() for caption in captions]
    expected = ours(native, BATCHES["masked"])
    found = ours(native.bfloat16(), half)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_captions_of_different_lengths_equal_each_alone() -> None:
    native = native_like(diffusers_model())
    with float64(native):
        latents, time, captions = batch((5, 70, 33), (16, 8), torch.float64)
        together = ours(native, (latents, time, captions))
        for i, caption in enumerate(captions):
            alone = ours(native, (latents[i : i + 1], time[i : i + 1], [caption]))
            assert (together[i : i + 1] - alone).abs().max() < 1e-12


def test_what_stands_behind_a_caption_does_not_matter() -> None:
    native = native_like(diffusers_model())
    latents, time, captions = BATCHES["masked"]
    mask, padded = caption_mask(captions), pad_sequence(captions, batch_first=True)
    noisy = torch.where(mask[..., None], padded, torch.full_like(padded, 1e3))
    long = nn.functional.pad(noisy, (0, 0, 0, 60), value=7.0), nn.functional.pad(mask, (0, 60))
    with torch.no_grad():
        plain = native(latents, time, padded, mask)
        assert torch.equal(plain, native(latents, time, noisy, mask))
        assert torch.equal(plain, native(latents, time, *long))


@pytest.mark.parametrize("name", BATCHES)
def test_places_made_ahead_equal_those_of_the_call(name: str) -> None:
    native = native_like(diffusers_model())
    latents, time, captions = BATCHES[name]
    ahead = native.places([len(c) for c in captions], *latents.shape[2:], torch.device("cpu"))
    with torch.no_grad():
        found = native(latents, time, pad_sequence(captions, batch_first=True), places=ahead)
    assert torch.equal(found, ours(native, (latents, time, captions)))


def test_places_carry_no_mask_and_no_rows_for_nothing() -> None:
    def of(lengths: list[int]) -> Places:
        return places(lengths, 3, 5, dims=[4, 6, 6], lens=[130, 16, 16], theta=256.0)

    even, uneven = of([35, 50]), of([5, 70])
    assert even.seen is None and even.text[0].shape == (1, 64, 8) and even.image[0].shape == (1, 32, 8)
    assert uneven.seen is not None and uneven.text[0].shape == (2, 96, 8) and uneven.image[0].shape == (2, 32, 8)
    assert even.own.sum(1).tolist() == [35, 50] and uneven.seen.sum(1).tolist() == [32, 96]


def test_the_last_positions_are_used() -> None:
    reference = diffusers_model()
    assert gap(native_like(reference), reference, batch((128,), (32, 4))) < ROUNDING


@pytest.mark.parametrize(
    ("lengths", "size"), [((129,), (4, 4)), ((5,), (34, 4)), ((5,), (4, 34))], ids=["text", "rows", "columns"]
)
def test_what_has_no_position_is_refused(lengths: tuple[int, ...], size: tuple[int, int]) -> None:
    """diffusers indexes out of its tables there."""
    reference = diffusers_model()
    given = batch(lengths, size)
    with pytest.raises(UsageError, match="no positions") as error:
        ours(native_like(reference), given)
    assert "128 tokens and 16 x 16 patches" in str(error.value.expected)
    with pytest.raises(IndexError):
        theirs(reference, given)


def test_names_and_shapes_are_those_of_diffusers_at_real_size() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        reference = ZImageTransformer2DModel()
        config = {key: value for key, value in reference.config.items() if key != "siglip_feat_dim"}
        native = ZImageTransformer.from_config({"_class_name": "ZImageTransformer2DModel", **config})
    expected = packed(ZImageTransformer, config, reference.state_dict())  # on the meta device: shapes only
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in (native.state_dict(), expected)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in native.parameters()) == 6_154_908_736


def _swapped_q_k(model: ZImageTransformer) -> None:
    weight = model.layers[0].attention.to_qkv.weight
    q, k, v = weight.data.chunk(3)
    weight.data = torch.cat([k, q, v])


def _swapped_gate(model: ZImageTransformer) -> None:
    weight = model.context_refiner[1].feed_forward.w13.weight
    weight.data = weight.data.roll(weight.shape[0] // 2, 0)


def _eps(model: ZImageTransformer) -> None:
    model.noise_refiner[0].attention.norm_q.eps = 1e-2


def _final_eps(model: ZImageTransformer) -> None:
    model.all_final_layer["2-1"].norm_final.eps = 1e-3


def _no_gate(model: ZImageTransformer) -> None:
    model.layers[1].adaLN_modulation[0].bias.data[48:96].zero_()


def _scale(model: ZImageTransformer) -> None:
    object.__setattr__(model.params, "t_scale", 999.0)


def _moved(change: Callable[[Places], Places]) -> Callable[[ZImageTransformer], None]:
    def fault(model: ZImageTransformer) -> None:
        right = model.places
        model.places = lambda *args: change(right(*args))  # type: ignore[method-assign]

    return fault


FAULTS = {
    "q and k": _swapped_q_k,
    "gate and up": _swapped_gate,
    "eps of q": _eps,
    "eps of the last norm": _final_eps,
    "gate": _no_gate,
    "scale of time": _scale,
    "learned filling": _moved(lambda p: p._replace(own=torch.ones_like(p.own))),
    "mask": _moved(lambda p: p._replace(seen=None)),
    "image behind another caption": _moved(lambda p: p._replace(image=(p.image[0].flip(0), p.image[1].flip(0)))),
    "places of the image": _moved(lambda p: p._replace(image=(p.image[0].roll(1, 1), p.image[1].roll(1, 1)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_exceed_rounding(fault: str) -> None:
    reference = diffusers_model()
    native = native_like(reference)
    FAULTS[fault](native)
    assert gap(native, reference, BATCHES["masked"]) > 3 * ROUNDING


def test_every_input_matters() -> None:
    native = native_like(diffusers_model())
    latents, time, captions = BATCHES["masked"]
    plain = ours(native, (latents, time, captions))
    for moved in (
        (latents * 1.1, time, captions),
        (latents, time + 0.1, captions),
        (latents, time, [caption * torch.linspace(1, 2, 20) for caption in captions]),
        (latents, time, [caption[:-1] for caption in captions]),
    ):
        assert (ours(native, moved) - plain).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, "all_patch_size"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size"),
        ({"siglip_feat_dim": 16}, "siglip_feat_dim"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"axes_dims": [4, 6, 8]}, "axes_dims"),
        ({"axes_lens": [64, 64]}, "axes_lens"),
        ({"theta": 5}, "theta"),
        ({"t_scale": ...}, "t_scale"),
    ],
    ids=str,
)
def test_a_config_that_the_model_does_not_have_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not ...}
    with pytest.raises(BadInputError, match=named) as error:
        ZImageParams.from_config(config)
    assert error.value.expected and error.value.found and error.value.hint


def test_the_native_model_imports_neither_library() -> None:
    code = "import sys, conversions.z_image.model; print({'diffusers', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
