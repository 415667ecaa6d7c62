"""CPU stand-ins of GPU-only packages: each against plain attention in float64, written another way."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parity import shims, shims_kernels
from parity.foreign import record_elsewhere
from parity.recorder import float64
from porter.core.errors import BadInputError
from tests.parity.cases import write_case

PACKAGES = tuple(shims.VERSIONS)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No stand-in outlives its test."""
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    shims_kernels.CALLED.clear()
    for path in [p for p in sys.modules if p.partition(".")[0] in PACKAGES]:
        del sys.modules[path]


@pytest.fixture
def flash() -> ModuleType:
    assert "flash_attn" in shims.install(["flash_attn"])
    return importlib.import_module("flash_attn")


@pytest.fixture
def xops() -> ModuleType:
    assert "xformers" in shims.install(["xformers"])
    return importlib.import_module("xformers.ops")


def numbers(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    seed = sum(map(ord, name))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, seen: Any = lambda i, j: True,
    bias: Any = lambda h, i, j: 0.0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of (S, H, D) each by loops over heads, queries and keys, in Python's own arithmetic."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    share = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        for i in range(q.shape[0]):
            keys = [j for j in range(k.shape[0]) if seen(i, j)]
            scores = [float(q[i, h].double() @ k[j, h // share].double()) * scale for j in keys]
            scores = [softcap * math.tanh(s / softcap) for s in scores] if softcap else scores
            scores = [s + bias(h, i, j) for s, j in zip(scores, keys, strict=True)]
            total = sum(math.exp(s) for s in scores)
            for s, j in zip(scores, keys, strict=True):
                out[i, h] += math.exp(s) / total * v[j, h // share].double()
    return out


def bottom_right(queries: int, keys: int, left: int = -1, right: int = -1) -> Any:
    shift = keys - queries
    return lambda i, j: (right < 0 or j <= i + shift + right) and (left < 0 or j >= i + shift - left)


def close(made: Tensor, expected: Tensor, tolerance: float = 1e-13) -> bool:
    return made.shape == expected.shape and float((made.detach().double() - expected.detach()).abs().max()) < tolerance


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("plain", {}, {}),
    ("scale", {"softmax_scale": 0.3}, {"scale": 0.3}),
    ("causal", {"causal": True}, {"window": (-1, 0)}),
    ("window", {"window_size": (2, 1)}, {"window": (2, 1)}),
    ("left window", {"window_size": (1, -1)}, {"window": (1, -1)}),
    ("causal window", {"causal": True, "window_size": (2, 3)}, {"window": (2, 0)}),
    ("softcap", {"softcap": 0.7}, {"softcap": 0.7}),
    ("softcap, causal", {"softcap": 0.7, "causal": True}, {"softcap": 0.7, "window": (-1, 0)}),
]


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (6, 2)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("name", "given", "means"), OPTIONS, ids=[o[0] for o in OPTIONS])
def test_flash_attention(
    flash: ModuleType, lengths: tuple[int, int], heads: tuple[int, int], name: str, given: Any, means: Any
) -> None:
    """Other lengths for queries and keys, grouped heads; a query that sees nothing answers zeros."""
    (queries, keys), (many, few) = lengths, heads
    q, k, v = numbers("q", 2, queries, many, 8), numbers("k", 2, keys, few, 8), numbers("v", 2, keys, few, 8)
    seen = bottom_right(queries, keys, *means.get("window", (-1, -1)))
    rest = {key: value for key, value in means.items() if key != "window"}
    expected = torch.stack([plain(q[b], k[b], v[b], seen=seen, **rest) for b in range(2)])
    assert close(flash.flash_attn_func(q, k, v, **given), expected)
    assert close(flash.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **given), expected)
    assert shims.used() == ["flash_attn.flash_attn_func", "flash_attn.flash_attn_kvpacked_func"]
    if lengths == (5, 5) and many == few:
        assert close(flash.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **given), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_agrees_with_torch(flash: ModuleType, causal: bool) -> None:
    q, k, v = (numbers(n, 2, 6, 4, 8) for n in "qkv")
    made = flash.flash_attn_func(q, k, v, causal=causal)
    other = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)
    assert close(made, other)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(flash: ModuleType, rows: int, causal: bool) -> None:
    q, k, v = numbers("q", 2, 3, 4, 8), numbers("k", 2, 5, 4, 8), numbers("v", 2, 5, 4, 8)
    slopes = numbers("slopes", 2, 4).abs()
    given = slopes[0] if rows == 1 else slopes
    seen = bottom_right(3, 5, -1, 0 if causal else -1)

    def bias(b: int) -> Any:
        return lambda h, i, j: -float(slopes[b if rows == 2 else 0, h]) * abs(i + 2 - j)

    expected = torch.stack([plain(q[b], k[b], v[b], seen=seen, bias=bias(b)) for b in range(2)])
    assert close(flash.flash_attn_func(q, k, v, alibi_slopes=given, causal=causal), expected)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (3, 5)]
    ragged = flash.flash_attn_varlen_func(*flat, *starts, 3, 5, alibi_slopes=given, causal=causal)
    assert close(ragged, expected.flatten(0, 1))


@pytest.mark.parametrize(("name", "given", "means"), OPTIONS, ids=[o[0] for o in OPTIONS])
def test_ragged_sequences(flash: ModuleType, name: str, given: Any, means: Any) -> None:
    """Each sequence alone, one of them empty of queries; grouped heads."""
    queries, keys = [4, 0, 3], [4, 2, 6]
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (queries, keys))
    q, k, v = numbers("q", 7, 4, 8), numbers("k", 12, 2, 8), numbers("v", 12, 2, 8)
    rest = {key: value for key, value in means.items() if key != "window"}
    parts = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        seen = bottom_right(int(b - a), int(d - c), *means.get("window", (-1, -1)))
        parts.append(plain(q[a:b], k[c:d], v[c:d], seen=seen, **rest))
    expected = torch.cat(parts)
    assert close(flash.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 6, **given), expected)
    packed = flash.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), cu_q, cu_k, 4, 6, **given)
    assert close(packed, expected)
    qkv = torch.stack((k, k, v), 1)
    alone = flash.flash_attn_varlen_func(k, k, v, cu_k, cu_k, 6, 6, **given)
    assert close(flash.flash_attn_varlen_qkvpacked_func(qkv, cu_k, 6, **given), alone)


def test_ragged_sequences_that_do_not_fit_are_refused(flash: ModuleType) -> None:
    q = numbers("q", 7, 2, 4)
    cu = torch.tensor([0, 4, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="sequence 0 has 4 and 4 tokens, at most 3"):
        flash.flash_attn_varlen_func(q, q, q, cu, cu, 3, 4)
    with pytest.raises(ValueError, match="are not those of 6 and 7 tokens"):
        flash.flash_attn_varlen_func(q[:6], q, q, cu, cu, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_stays(flash: ModuleType, dtype: torch.dtype) -> None:
    """float32 is no more exact than float32; half precision is rounded once."""
    q, k, v = (numbers(n, 1, 5, 2, 8, dtype=dtype) for n in "qkv")
    made = flash.flash_attn_func(q, k, v)
    assert made.dtype == dtype
    expected = plain(q[0], k[0], v[0])[None]
    eps = torch.finfo(dtype).eps
    assert close(made, expected, 4 * eps) and (dtype == torch.float64 or not torch.equal(made.double(), expected))


def test_under_the_arbiter_all_is_float64(flash: ModuleType) -> None:
    q, k, v = (numbers(n, 1, 5, 2, 8) for n in "qkv")
    norm = importlib.import_module("flash_attn.ops.triton.layer_norm")
    with float64():
        made = flash.flash_attn_func(q, k, v, causal=True)
        normed, whole = norm.rms_norm_fn(q, torch.ones(8), None, residual=k, prenorm=True, residual_in_fp32=True)
    assert made.dtype == normed.dtype == whole.dtype == torch.float64
    assert close(made, plain(q[0], k[0], v[0], seen=bottom_right(5, 5, -1, 0))[None])


@pytest.mark.parametrize(
    "option",
    [{"dropout_p": 0.1}, {"return_attn_probs": True}],
    ids=str,
)
def test_what_is_not_there_is_refused(flash: ModuleType, option: dict[str, Any]) -> None:
    q = numbers("q", 1, 3, 2, 4)
    with pytest.raises(NotImplementedError, match=rf"flash_attn_func .*shims\.py.*{next(iter(option))}"):
        flash.flash_attn_func(q, q, q, **option)
    with pytest.raises(NotImplementedError, match="block_table"):
        cu = torch.tensor([0, 3], dtype=torch.int32)
        flash.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, block_table=cu)
    with pytest.raises(TypeError, match="float32"):
        flash.flash_attn_func(q, q.float(), q)
    with pytest.raises(ValueError, match="do not fit"):
        flash.flash_attn_func(q, q[:, :, :1].expand(1, 3, 3, 4), q)
    with pytest.raises(NotImplementedError, match=r"flash_attn_with_kvcache on the CPU \(parity/shims\.py\)"):
        flash.flash_attn_with_kvcache(q, q, q)
    assert shims.used() == ["flash_attn.flash_attn_func", "flash_attn.flash_attn_varlen_func"]


def test_flash_attention_3() -> None:
    """It is made on demand, and answers with the output alone."""
    shims.install([n for n in shims.USUAL if n != shims.CUDA])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn_interface")
    shims.install(["flash_attn_interface"])
    module = importlib.import_module("flash_attn_interface")
    q, k, v = numbers("q", 1, 3, 4, 8), numbers("k", 1, 5, 2, 8), numbers("v", 1, 5, 2, 6)
    expected = plain(q[0], k[0], v[0], seen=bottom_right(3, 5, -1, 0), scale=0.2)
    assert close(module.flash_attn_func(q, k, v, softmax_scale=0.2, causal=True), expected[None])
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 5))
    made = module.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 3, 5, causal=True, softmax_scale=0.2)
    assert close(made, expected)
    with pytest.raises(NotImplementedError, match="seqused_k"):
        module.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 3, 5, seqused_k=cu_k)


def test_padding(flash: ModuleType) -> None:
    padding = importlib.import_module("flash_attn.bert_padding")
    x = numbers("x", 2, 4, 3, 5)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    tokens, places, starts, longest, lengths = padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask]) and places.tolist() == [0, 1, 3, 5]
    assert starts.tolist() == [0, 3, 4] and starts.dtype == torch.int32 and longest == 3 and lengths.tolist() == [3, 1]
    back = padding.pad_input(tokens, places, 2, 4)
    assert torch.equal(back, torch.where(mask[..., None, None], x, torch.zeros(1, dtype=x.dtype)))
    assert torch.equal(padding.index_first_axis(x.flatten(0, 1), places), x[mask])


def test_a_version_s_conventions() -> None:
    """Before 2.7 four values came back; before 2.1 causal masks lay otherwise, which nothing stands in for."""
    with pytest.raises(ValueError, match=r"before 2\.1"):
        shims.install(["flash_attn==2.0.9"])
    shims.install(["flash_attn==2.6.3"])
    assert importlib.import_module("flash_attn").__version__ == "2.6.3"
    padding = importlib.import_module("flash_attn.bert_padding")
    assert len(padding.unpad_input(numbers("x", 1, 2, 3), torch.ones(1, 2))) == 4


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(flash: ModuleType, interleaved: bool) -> None:
    """Against multiplication by complex numbers; six of eight channels are turned."""
    rotary = importlib.import_module("flash_attn.layers.rotary")
    x, angle = numbers("x", 2, 5, 3, 8), numbers("angle", 9, 3)
    pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else torch.stack((x[..., :3], x[..., 3:6]), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle[2:7, None]))
    flat = turned.flatten(-2) if interleaved else torch.cat((turned[..., 0], turned[..., 1]), -1)
    expected = torch.cat((flat, x[..., 6:]), -1)
    made = rotary.apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved=interleaved, seqlen_offsets=2)
    assert close(made, expected)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    offsets = torch.tensor([2, 2])
    tokens = x.flatten(0, 1)
    made = rotary.apply_rotary_emb(
        tokens, angle.cos(), angle.sin(), interleaved, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5
    )
    assert close(made, expected.flatten(0, 1)) and not torch.equal(tokens, made)
    rotary.apply_rotary_emb(tokens, angle[2:].cos(), angle[2:].sin(), interleaved, True, 0, starts, 5)
    assert close(tokens, expected.flatten(0, 1))


def test_norms(flash: ModuleType) -> None:
    norms = importlib.import_module("flash_attn.ops.triton.layer_norm")
    x, r, w, b = numbers("x", 2, 3, 8), numbers("r", 2, 3, 8), numbers("w", 8), numbers("b", 8)
    layer, whole = norms.layer_norm_fn(x, w, b, residual=r, eps=1e-3, prenorm=True)
    assert close(layer, F.layer_norm(x + r, (8,), w, b, 1e-3)) and torch.equal(whole, x + r)
    assert close(norms.rms_norm_fn(x, w, b, eps=1e-3), F.rms_norm(x, (8,), w, 1e-3) + b)
    half = norms.rms_norm_fn(x.bfloat16(), w.float(), None, residual=r.float(), prenorm=True)
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(NotImplementedError, match="x1"):
        norms.rms_norm_fn(x, w, b, x1=True)
    ops = importlib.import_module("flash_attn.ops.rms_norm")
    module = ops.RMSNorm(8, eps=1e-3).double()
    assert close(module(x), F.rms_norm(x, (8,), None, 1e-3)) and close(
        ops.rms_norm(x, w, 1e-3), F.rms_norm(x, (8,), w, 1e-3)
    )
    activations = importlib.import_module("flash_attn.ops.activations")
    assert close(activations.swiglu(x, r), x * torch.sigmoid(x) * r)


def test_xformers_attention(xops: ModuleType) -> None:
    q, k, v = numbers("q", 2, 5, 3, 8), numbers("k", 2, 4, 3, 8), numbers("v", 2, 4, 3, 6)
    bias = numbers("bias", 2, 3, 5, 4)

    def each(**means: Any) -> Tensor:
        return torch.stack([plain(q[b], k[b], v[b], **means) for b in range(2)])

    call = xops.memory_efficient_attention
    assert close(call(q, k, v), each()) and close(call(q, k, v, scale=0.1, op=None), each(scale=0.1))
    biased = [plain(q[b], k[b], v[b], bias=lambda h, i, j, b=b: float(bias[b, h, i, j])) for b in range(2)]
    assert close(call(q, k, v, attn_bias=bias), torch.stack(biased))
    top_left = each(seen=lambda i, j: j <= i)
    assert close(call(q, k, v, attn_bias=xops.LowerTriangularMask()), top_left)
    hidden = torch.full((5, 4), float("-inf"), dtype=torch.float64).triu(1)
    assert close(call(q, k, v, attn_bias=hidden.expand(2, 3, 5, 4)), top_left)
    bottom = xops.LowerTriangularFromBottomRightMask()
    swapped = torch.stack([plain(k[b], q[b], q[b], seen=bottom_right(4, 5, -1, 0)) for b in range(2)])
    assert close(call(k, q, q, attn_bias=bottom), swapped)
    single = [t[:, :, 0] for t in (q, k, v)]
    made = call(*single, attn_bias=bias[:, 0])
    one = [
        plain(q[b, :, :1], k[b, :, :1], v[b, :, :1], bias=lambda h, i, j, b=b: float(bias[b, 0, i, j]))
        for b in range(2)
    ]
    assert close(made, torch.stack(one)[:, :, 0])
    with pytest.raises(NotImplementedError, match=r"memory_efficient_attention .*p=0\.2"):
        call(q, k, v, p=0.2)
    with pytest.raises(ValueError, match="attn_bias has shape"):
        call(q, k, v, attn_bias=bias[:, :, :4])


@pytest.mark.parametrize("kind", ["whole", "causal", "bottom right"])
def test_xformers_blocks(xops: ModuleType, kind: str) -> None:
    """Sequences one after the other: each sees itself, and of itself what the mask shows."""
    queries, keys = [3, 1, 2], [3, 4, 5]
    q, k, v = numbers("q", 1, 6, 2, 8), numbers("k", 1, 12, 2, 8), numbers("v", 1, 12, 2, 8)
    mask = xops.fmha.BlockDiagonalMask.from_seqlens(queries, keys)
    mask = {"whole": mask, "causal": mask.make_causal(), "bottom right": mask.make_causal_from_bottomright()}[kind]
    parts, a, c = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        seen = {"whole": lambda i, j: True, "causal": lambda i, j: j <= i, "bottom right": bottom_right(n, m, -1, 0)}
        parts.append(plain(q[0, a : a + n], k[0, c : c + m], v[0, c : c + m], seen=seen[kind]))
        a, c = a + n, c + m
    assert close(xops.memory_efficient_attention(q, k, v, attn_bias=mask), torch.cat(parts)[None])


def test_xformers_lists_of_tensors(xops: ModuleType) -> None:
    given = [numbers("a", 2, 3, 1, 4), numbers("b", 1, 5, 1, 4)]
    mask, whole = xops.fmha.BlockDiagonalMask.from_tensor_list(given)
    assert whole.shape == (1, 11, 1, 4)
    assert all(torch.equal(a, b) for a, b in zip(mask.split(whole), given, strict=True))
    made = mask.split(xops.memory_efficient_attention(whole, whole, whole, attn_bias=mask))
    assert close(made[0][1], plain(*[given[0][1]] * 3)) and close(made[1][0], plain(*[given[1][0]] * 3))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_xformers_swiglu(xops: ModuleType, packed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = xops.SwiGLU(6, 10, 4, bias=bias, _pack_weights=packed).double()
    x = numbers("x", 2, 3, 6)
    state = module.state_dict()
    assert set(state) == {f"{n}.{k}" for n in (("w12", "w3") if packed else ("w1", "w2", "w3"))
                          for k in (("weight", "bias") if bias else ("weight",))}  # fmt: skip
    first = (
        F.linear(x, state["w12.weight"], state.get("w12.bias")).chunk(2, -1) if packed else (module.w1(x), module.w2(x))
    )
    assert close(module(x), module.w3(F.silu(first[0]) * first[1]))
    assert [t.shape for t in xops.unbind(numbers("y", 3, 4), 0)] == [(4,)] * 3


@pytest.mark.parametrize("name", ["FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"])
def test_apex(name: str) -> None:
    shims.install(["apex"])
    kind = getattr(importlib.import_module("apex.normalization"), name)
    assert kind is getattr(importlib.import_module("apex.normalization.fused_layer_norm"), name)
    x = numbers("x", 2, 3, 4, 5)
    module = kind([4, 5], eps=1e-3).double()
    state = {"weight": numbers("w", 4, 5), "bias": numbers("b", 4, 5)}
    if "RMS" in name:
        del state["bias"]
        expected = F.rms_norm(x, (4, 5), state["weight"], 1e-3)
    else:
        expected = F.layer_norm(x, (4, 5), state["weight"], state["bias"], 1e-3)
    module.load_state_dict(state)
    assert close(module(x), expected) and shims.used() == [f"apex.normalization.{name}"]
    mixed = module.float()(x.bfloat16())
    assert mixed.dtype == (torch.float32 if name.startswith("Mixed") else torch.bfloat16)
    if name.startswith("Mixed"):
        with pytest.raises(RuntimeError, match="elementwise_affine"):
            kind(4, elementwise_affine=False)
    else:
        assert close(
            kind(5, elementwise_affine=False)(x), (F.rms_norm if "RMS" in name else F.layer_norm)(x, (5,), eps=1e-5)
        )


def test_what_a_stand_in_lacks_cannot_be_imported(flash: ModuleType) -> None:
    with pytest.raises(ImportError, match=r"cannot import name 'flash_attn_unpadded_func' .*parity/shims\.py"):
        exec("from flash_attn import flash_attn_unpadded_func", {})
    with pytest.raises(ModuleNotFoundError, match=r"parity/shims\.py\) has no flash_attn\.losses"):
        importlib.import_module("flash_attn.losses.cross_entropy")
    assert importlib.util.find_spec("flash_attn") is not None and not hasattr(flash, "nothing")
    with pytest.raises(ValueError, match=r"no stand-in for 'bitsandbytes'; it has flash_attn"):
        shims.install(["bitsandbytes"])


def test_a_package_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is installed and broken is replaced, without a trace of it."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("from flash_attn import inner\nreal = True\n")
    (tmp_path / "flash_attn" / "inner.py").write_text("")
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("import xformers.half\nraise OSError('libcudart.so.12')\n")
    (tmp_path / "xformers" / "half.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert shims.install([n for n in shims.USUAL if n != shims.CUDA]) == list(shims.USUAL[1:-1])
    assert importlib.import_module("flash_attn").real
    assert "xformers.half" not in sys.modules and importlib.import_module("xformers.ops").unbind


def test_the_files_need_torch_only() -> None:
    """They run in an interpreter where nothing else of the project, and no numpy or safetensors, is imported."""
    code = (
        "import sys; from parity import shims; shims.install(); import flash_attn, xformers.ops, apex.normalization\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('porter', 'safetensors', 'einops', 'click')"
        " or m.startswith('parity.') and not m.startswith(('parity.shims', 'parity.stubs'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@torch.no_grad()
def test_timm() -> None:
    assert "timm" in shims.install(["timm"])
    layers = importlib.import_module("timm.models.vision_transformer")
    x = numbers("x", 2, 12, 8)
    attention = layers.Attention(8, num_heads=2, qkv_bias=True, qk_norm=True).double().eval()
    q, k, v = attention.qkv(x).reshape(2, 12, 3, 2, 4).unbind(2)
    q, k = (F.layer_norm(t, (4,), norm.weight, norm.bias) for t, norm in ((q, attention.q_norm), (k, attention.k_norm)))
    rows = [attention.proj(plain(q[b], k[b], v[b]).flatten(1)) for b in range(2)]
    torch.testing.assert_close(attention(x), torch.stack(rows), atol=1e-12, rtol=0)
    mlp = layers.Mlp(8, 16, act_layer=lambda: torch.nn.GELU(approximate="tanh"), drop=0.1).double().eval()
    wanted = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh"), mlp.fc2.weight)
    torch.testing.assert_close(mlp(x), wanted + mlp.fc2.bias, atol=1e-12, rtol=0)
    patches = layers.PatchEmbed(6, 2, 3, 8).double()
    picture = numbers("picture", 1, 3, 6, 6)
    assert patches.num_patches == 9
    wanted = patches.proj.weight.flatten(1) @ picture[0, :, 2:4, 4:6].flatten() + patches.proj.bias
    torch.testing.assert_close(patches(picture)[0, 5], wanted, atol=1e-12, rtol=0)
    with pytest.raises(AssertionError, match="does not match"):
        patches(numbers("other", 1, 3, 6, 8))
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert {"timm.layers.Attention", "timm.layers.Mlp", "timm.layers.PatchEmbed"} <= set(shims.used())
    for refused in (lambda: layers.Attention(8, gated=True), lambda: layers.Mlp(8, odd=1)):
        with pytest.raises(NotImplementedError, match=r"timm\.layers"):
            refused()


NEEDS_A_GPU = """
class Reference(Net):
    def __init__(self):
        super().__init__()
        self.to("cuda")
        self.register_buffer("table", torch.arange(4.0, device=torch.device("cuda", 0)), persistent=False)
    def forward(self, x):
        assert x.device.type == "cuda" and x.dtype == torch.float32
        shift = torch.zeros(4, device=torch.cuda.current_device()).to(x.device) + self.table.cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return super().forward(x + shift.to(0) - shift)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_code_that_asks_for_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    path = write_case(tmp_path, NEEDS_A_GPU)
    with pytest.raises(BadInputError, match=r"case.py:\d+: self.to\(\"cuda\"\)") as refused:
        record_elsewhere(path)
    assert refused.value.hint and "--shims" in refused.value.hint
    trace = record_elsewhere(path, shims=())
    assert trace.meta["shims"] == ["torch's device cuda"]
    plain = record_elsewhere(write_case(tmp_path, name="plain.py"))
    key = "forward/=.out.0"
    assert (trace.value(key).high - plain.value(key).high).abs().max() < 1e-12 and "float64" not in trace.meta


def test_the_hubs_flash_attention_is_the_stand_in_and_nothing_else_is() -> None:
    assert shims.install(["kernels"]) == ["kernels"]
    get = importlib.import_module("kernels").get_kernel
    q, k, v = (numbers(name, 1, 5, 2, 4) for name in "qkv")
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    for name in (
        "kernels-community/flash-attn2",
        "kernels-community/flash-attn3",
        "kernels-community/vllm-flash-attn3",
    ):
        assert torch.allclose(get(name, version=1).flash_attn_func(q, k, v), expected, atol=1e-14)
    with pytest.raises(ImportError, match="has no kernels-community/activation"):
        get("kernels-community/activation")
