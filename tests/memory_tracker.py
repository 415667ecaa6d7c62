"""The oracle of the memory formulas: the real class at its real size, without its weights, under torch's tracker.

The module is built on the meta device, its parameters become fake tensors (`FakeTensorMode`), and one forward runs
under `torch.distributed._tools.mem_tracker.MemTracker`, which follows every storage from its making to its release.

The fake device is the CPU: fake CUDA tensors cannot even be indexed where torch was built without CUDA. The two
functions whose kernels on CUDA allocate otherwise are put right in `_AsOnCuda`: attention is the fused kernel (flash
for 16-bit types without a mask, memory-efficient otherwise; no matrix of scores), and `rms_norm` is one kernel. What
kernels allocate inside themselves, the allocator's fragmentation and the CUDA context are not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn, no_grad
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

DEVICE = torch.device("cpu")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Measured:
    """Bytes on the device at the peak of one call.

    Attributes:
        activations: everything alive at the peak that is neither a parameter nor a buffer of the module: inputs,
            temporaries and outputs.
        weights: parameters and buffers.
        alive: with `explain`, the largest tensors at the peak: (bytes, operator that made it, shape, dtype).
    """

    activations: int
    weights: int
    alive: tuple[tuple[int, str, tuple[int, ...], str], ...] = ()


def measure(
    build: Callable[[], nn.Module],
    inputs: Mapping[str, Any],
    dtype: str = "BF16",
    call: Callable[..., Any] | None = None,
    explain: bool = False,
    read: int = 1,
    experts: int = 1,
) -> Measured:
    """Peak memory of `build()(**inputs)`, in inference, without gradients.

    Args:
        build: makes the module; called under `torch.device("meta")`, so nothing is allocated.
        inputs: keyword arguments. A tuple of ints stands for a tensor of that shape in `dtype`; `(shape, torch.dtype)`
            for a tensor of another dtype; lists and dicts are followed; everything else is passed on.
        dtype: safetensors code of the dtype that the module is loaded in. Parameters that the class names in
            `_keep_in_fp32_modules` stay in float32, as `from_pretrained` leaves them.
        call: what is run instead of `module(**inputs)`: `call(module, **inputs)`.
        explain: also list what is alive at the peak (slow).
        read: what reading a whole number from a fake tensor answers, for modules that count a mask's entries. Masks
            that index are all True: prompts fill their padding, which is the most that a module computes with. So an
            inverted one (`~mask`) is all False. A fake tensor that is asked whether it is true is: what pads for a
            picture that is not there is all zeros.
        experts: among how many experts a router's choices are counted (`bincount`): each gets as many.
    """
    with torch.device("meta"):
        module = build().eval()
    cast(module, DTYPES[dtype])
    # Sizes that a module keeps in a tensor of a few whole numbers stay known where it slices by them.
    with patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 8), FakeTensorMode(allow_non_fake_inputs=True), no_grad():
        module._apply(lambda old: torch.empty(old.shape, dtype=old.dtype, device=DEVICE))
        given = {name: _tensor(value, DTYPES[dtype]) for name, value in inputs.items()}
        tracker = _Tracker(explain)
        tracker.track_external(module, *_tensors(given))
        if explain:
            tracker.label("weight", *module.parameters(), *module.buffers())
            tracker.label("input", *_tensors(given))
        with _AsOnCuda(read, experts), tracker:
            (call or _forward)(module, **given)
        return tracker.peak()


def _forward(module: nn.Module, **given: Any) -> Any:
    return module(**given)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """The dtypes that `from_pretrained(dtype=…)` gives, with the class's exceptions."""
    keep = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if isinstance(module, PreTrainedModel) and dtype != torch.float16:
        keep = set()  # transformers keeps them for float16 alone, diffusers for every 16-bit type
    for name, part in module.named_modules():
        for table in (part._parameters, part._buffers):
            for own, old in table.items():
                if old is None or not old.is_floating_point():
                    continue
                kept = table is part._parameters and any(k in f"{name}.{own}".split(".") for k in keep)
                if table is part._buffers and own in part._non_persistent_buffers_set:
                    continue  # not in the checkpoint, so loading leaves it as it was made
                new = old.to(torch.float32 if kept else dtype)
                table[own] = nn.Parameter(new, old.requires_grad) if table is part._parameters else new


def _tensor(value: Any, dtype: torch.dtype) -> Any:
    if type(value) is tuple and value and all(isinstance(size, int) for size in value):
        return torch.empty(value, dtype=dtype, device=DEVICE)
    if type(value) is tuple and len(value) == 2 and isinstance(value[1], torch.dtype):
        return torch.empty(value[0], dtype=value[1], device=DEVICE)
    if isinstance(value, list):
        return [_tensor(item, dtype) for item in value]
    if isinstance(value, dict):
        return {name: _tensor(item, dtype) for name, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


class _Tracker(MemTracker):
    """torch's tracker with the peak of the device alone, without the peaks of modules, which cost most of its time."""

    def __init__(self, explain: bool) -> None:
        super().__init__()
        self._explain = explain
        self._made: dict[int, tuple[weakref.ref[Any], str, tuple[int, ...], str]] = {}
        self._alive: tuple[tuple[int, str, tuple[int, ...], str], ...] = ()
        self._most = 0
        self._function = ""

    def label(self, what: str, *tensors: Tensor) -> None:
        """Notes what a tensor's storage holds, unless it is known."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (known := self._made.get(id(storage))) is None or known[0]() is not storage:
                text = (what, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                self._made[id(storage)] = (weakref.ref(storage), *text)

    def _update_peak_stats(self, peak_state: Any) -> None:
        snapshot = self._curr_mem_snap.get(DEVICE)
        if snapshot is None or (now := self._non_weights(snapshot)) <= self._most:
            return
        self._most = now
        self._peak_mem_snap[DEVICE] = dict(snapshot)
        if self._explain:
            alive = [(ref(), *rest) for ref, *rest in self._made.values()]
            sizes = (
                (storage.nbytes(), *rest) for storage, *rest in alive if storage is not None and rest[0] != "weight"
            )
            self._alive = tuple(sorted(sizes, reverse=True)[:60])

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        pass

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._function = str(func).removeprefix("aten.")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _track(self, reftype: Any, t: Tensor) -> None:
        if self._explain:
            self.label(self._function, t)
        super()._track(reftype, t)

    @staticmethod
    def _non_weights(snapshot: Mapping[Any, int]) -> int:
        by_name = {getattr(key, "value", key): size for key, size in snapshot.items()}
        return by_name["Total"] - by_name["Parameter"] - by_name["Buffer"]

    def peak(self) -> Measured:
        snapshot = self._peak_mem_snap[DEVICE]
        return Measured(
            self._most,
            sum(size for key, size in snapshot.items() if getattr(key, "value", key) in ("Parameter", "Buffer")),
            self._alive,
        )


class _AsOnCuda(TorchFunctionMode):
    """Functions whose kernels on CUDA allocate something else than those on the CPU, or that need a tensor's values."""

    def __init__(self, read: int, experts: int) -> None:
        super().__init__()
        self._read, self._experts = read, experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func is nn.functional.rms_norm:
            return _fused_rms_norm(*args, **(kwargs or {}))
        if func is Tensor.item and not args[0].is_floating_point():
            return self._read
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return True
        if func is Tensor.bincount:
            with unset_fake_temporarily():  # what follows slices by the counts, so they have to be numbers
                return torch.full((self._experts,), args[0].numel() // self._experts)
        if func is Tensor.numpy:
            with unset_fake_temporarily():
                return func(*args)
        if func is Tensor.__invert__ and args[0].dtype is torch.bool:
            inverted = func(*args)
            inverted._of_a_full_mask = True
            return inverted
        if func is torch.nonzero:
            return torch.zeros((args[0].numel(), args[0].dim()), dtype=torch.int64, device=args[0].device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and getattr(args[1], "dtype", None) is torch.bool:
            picked = args[0].flatten(0, args[1].dim() - 1)
            picked = picked[:0] if hasattr(args[1], "_of_a_full_mask") else picked
            return picked.clone() if func is Tensor.__getitem__ else picked.copy_(args[2])
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What CUDA's wrapper allocates (native/transformers/attention.cpp): padded copies, the result, its logsumexp."""
    batch, heads, length, size = query.shape
    flash = attn_mask is None and query.dtype in (torch.float16, torch.bfloat16)
    if size % 8:  # kernels read whole vectors: the heads are padded, and the result is cut
        query, key, value = (nn.functional.pad(x, (0, 8 - size % 8)) for x in (query, key, value))
    if enable_gqa and key.shape[1] != heads and not flash:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = _bias(attn_mask, query)
    query.new_empty((batch, heads, length), dtype=torch.float32)  # the logsumexp; gone when the wrapper returns
    # Both kernels write [batch, length, heads, size], so that joining the heads afterwards copies nothing.
    return query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)[..., :size]


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as the kernel takes it: numbers in the query's dtype, rows padded to 16; expanding it copies nothing."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    length = mask.shape[-1]
    return nn.functional.pad(mask, (0, 16 - length % 16))[..., :length] if length % 16 else mask


def _fused_rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel on CUDA, but where a class keeps its norms in float32 and the input is none."""
    if weight is not None and weight.dtype != x.dtype:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatch dtype")  # says that it is not fused, as on CUDA
            return nn.functional.rms_norm(x, shape, weight, eps)
    return torch.empty_like(x)
