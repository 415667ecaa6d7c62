"""Record what a built module computes: a stand-alone file (torch, safetensors and the standard library only).

Copy it into the reference's own environment, or run it there by path; it imports nothing else of this project:

    python recorder.py --module mine.py:build --inputs inputs.safetensors --watch 'blocks\\.\\d+' -o trace.safetensors

`build()` returns the module with its weights loaded. Each pass runs twice, in float32 and in float64 (see `Float64`),
so that a trace carries its own noise floor. A tensor is stored as its float32 value plus the difference to float64,
also in float32: together they hold the float64 value to 14 digits at 8 bytes an element. Tensors over a watch's element
budget are stored as a fixed, spread-out sample of their elements.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SCHEMA = "porter.trace/1"
Call = Callable[[nn.Module, Mapping[str, Tensor]], Any]

# Draws keep float32 under `Float64`: another dtype would draw other numbers, and noise is an input, not arithmetic.
_DRAWS = {torch.randn, torch.rand, torch.normal, torch.randn_like, torch.rand_like}


_LIBRARY = re.compile(r"/(site|dist)-packages/(torch|einops)/|/lib/python[\d.]+/(?!(site|dist)-packages)")
_CACHE = type(functools.lru_cache(str))
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "einops", "porter", "parity"}
_NORMS = (torch.rms_norm, torch.nn.functional.rms_norm)
_LARGER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_SMALLER = {large: small for small, large in _LARGER.items()}


class Float64(TorchFunctionMode):
    """Keeps arithmetic in float64: a request for float32, by `.float()`, a dtype argument or a factory, gives float64.

    Integer, boolean and half-precision requests stay as they are: a cast to bfloat16 is a deviation, not an upcast. A
    tensor of float64 says that it is of float32, so that code which asks goes the way that it went in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            if kwargs.get("dtype") in (None, torch.float64):
                kwargs = {**kwargs, "dtype": torch.float32} if func is not torch.normal else kwargs
            drawn = func(*args, **kwargs)
            return drawn.double() if drawn.dtype == torch.float32 else drawn
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is torch.Tensor.dtype:
            found = func(*args)
            return _SMALLER.get(found, found)
        args = tuple(_larger(a) for a in args)
        kwargs = {k: _larger(v) for k, v in kwargs.items()}
        if func in _NORMS and len(args) < 4 and kwargs.get("eps") is None and args[0].element_size() == 8:
            kwargs["eps"] = torch.finfo(torch.float32).eps  # what none means follows the dtype
        return func(*args, **kwargs)


def _larger(value: Any) -> Any:
    return _LARGER.get(value, value) if isinstance(value, torch.dtype) else value


def forget(*modules: nn.Module) -> None:
    """Empty the `lru_cache` of every function of a model's code: what it keeps is of the precision it was made in."""
    for name, code in list(sys.modules.items()):
        if name.partition(".")[0] not in _LIBRARIES:
            if name not in _caches or _caches[name][0] is not code:
                _caches[name] = (code, _caches_of(code))
            for kept in _caches[name][1]:
                kept.cache_clear()
    for module in modules:
        for child in module.modules():
            for value in vars(child).values():
                if type(value) is _CACHE:
                    value.cache_clear()


_caches: dict[str, tuple[Any, list[Any]]] = {}  # a look at all objects would take 0.2 s each time


def _caches_of(code: Any) -> list[Any]:
    """Functions with a cache that a module or one of its classes holds."""
    own = [v for v in vars(code).values() if isinstance(v, (_CACHE, type))] if hasattr(code, "__dict__") else []
    methods = [v for c in own if isinstance(c, type) for v in vars(c).values()]
    found = [getattr(v, "__func__", v) for v in (*own, *methods)]
    return [v for v in found if type(v) is _CACHE]


Exact = Mapping[str, "tuple[Tensor, Tensor]"]  # tensor of a module -> as it is after rounding, and before


@contextmanager
def float64(*modules: nn.Module, exact: Exact | None = None) -> Iterator[None]:
    """Run `modules` in float64 inside the block; parameters, buffers and the default dtype are restored exactly.

    Args:
        exact: of the first module, by names as `held` gives them: what was rounded to float32, and takes its exact
            value wherever it still is that rounded one.
    """
    known = {id(t): exact[name] for name, t in held(modules[0]) if name in exact} if exact else {}
    saved = [
        [(t, t.data) for t in (*m.parameters(), *m.buffers(), *plain_tensors(m)) if t.dtype in _LARGER] for m in modules
    ]
    default = torch.get_default_dtype()
    try:
        for tensors in saved:
            for tensor, data in tensors:
                tensor.data = _exact(data, known.get(id(tensor)))
        torch.set_default_dtype(torch.float64)
        forget(*modules)
        with Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        forget(*modules)
        for tensors in saved:
            for tensor, data in tensors:
                tensor.data = data


def _exact(data: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    wide = data.to(_LARGER[data.dtype])
    if known is None or known[0].shape != data.shape:
        return wide
    return torch.where(data == known[0].to(data.device), known[1].to(wide), wide)


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors that are attributes of a module or of one below it, and neither parameter nor buffer."""
    return [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_inference()]


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a module holds, by `path.name`: parameters, buffers, attributes."""
    for path, child in module.named_modules():
        stem = path + "." if path else ""
        own = {k: t for k, t in vars(child).items() if isinstance(t, Tensor)}
        for name, tensor in {**child._parameters, **child._buffers, **own}.items():
            if tensor is not None:
                yield stem + name, tensor


def uncompiled() -> Any:
    """Let functions that a project compiles (`torch.compile`) run as they are written, inside the block."""
    stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return stance("force_eager") if stance else nullcontext()


@contextmanager
def lossy(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold `module` in a lossy dtype inside the block; parameters and buffers are restored exactly."""
    tensors = [(t, t.data) for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in tensors:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data


class Dtypes(TorchFunctionMode):
    """Notes which floating-point dtypes are computed while each watched module runs: the cast trace.

    `used` holds the ids of the parameters that something was computed with, by whatever module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.seen: dict[str, set[str]] = {}
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__":  # a look at its dtype or shape is no use of it
            self.used.update(id(item) for item in _flat(args, kwargs) if isinstance(item, nn.Parameter))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.seen.setdefault(self.stack[-1], set()).add(str(out.dtype).removeprefix("torch."))
        return out


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Iterator[Any]:
    """The arguments of a torch function, with what its lists hold."""
    for value in (*args, *(kwargs or {}).values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


class Singles(Dtypes):
    """Notes, of a run in float64, inside which modules numbers of float32 became numbers of float64.

    Such numbers were made where nobody sees it (by numpy, by an import), so that they carry float32's rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # `Float64` would hide what their dtypes are
            if isinstance(out, Tensor) and out.dtype in _SMALLER:
                given = (item for item in _flat(args, kwargs) if isinstance(item, Tensor))
                if any(item.dtype in _LARGER and item.numel() > 1 for item in given):
                    self.mixed.add(self.stack[-1])
        return out


@dataclasses.dataclass(frozen=True)
class Watch:
    """Which modules to record: a regular expression for the whole module path, and how many elements of each tensor."""

    pattern: str
    elements: int | None = None
    inputs: bool = True

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclasses.dataclass
class Event:
    """One recorded tensor: `key` is `<pass>/<module>#<call>.<in|out>.<name>`, unique, in order of execution."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    stored: str = ""
    noise: float = 0.0
    peak: float = 0.0
    losses: dict[str, list[float]] = dataclasses.field(
        default_factory=dict
    )  # dtype -> largest, rms distance to float64

    def row(self) -> list[Any]:
        """What the trace's metadata keeps; `Event(*row)` reads it."""
        numbers = [float(f"{x:.3g}") for x in (self.noise, self.peak)]
        losses = [self.losses] if self.losses else []
        return [self.key, list(self.shape), self.dtype, self.elements, self.stored, *numbers, *losses]


def told(error: BaseException) -> str:
    """`AssertionError: (no message), at modules/attention.py:52: assert dtype in half_dtypes`.

    The place is the last line of the model's own code, or of a library's that is not torch.
    """
    said = str(error) or "(no message)"
    said = said if len(said) <= 1000 else f"{said[:1000]} … ({len(said)} characters)"
    return f"{type(error).__name__}: {said}{place(traceback.extract_tb(error.__traceback__))}"


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of a model's own code among frames: `, at modules/attention.py:52: …`; empty for none."""
    own = [frame for frame in frames if _of_a_model(frame.filename)]
    if not own:
        return ""
    file, line = "/".join(Path(own[-1].filename).parts[-3:]), " ".join((own[-1].line or "").split())[:120]
    return f", at {file}:{own[-1].lineno}: {line}"


def _of_a_model(file: str) -> bool:
    return Path(file).parent != Path(__file__).parent and file[:1] != "<" and not _LIBRARY.search(file)


def tensors_of(value: Any, name: str = "", *, integers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name every tensor inside tuples, lists, mappings and dataclasses: `0`, `1`, `shift`, `sample` …

    Floating-point tensors only, unless `integers` (token ids) are wanted too.
    """
    for path, leaf in _named(value, name):
        if isinstance(leaf, Tensor) and (integers or leaf.is_floating_point()):
            yield path, leaf


def answers(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """What a pass answers, all of it: floating-point tensors as they are, others and plain numbers as float64.

    A complex tensor has its real and imaginary parts along a last axis.
    """
    for path, leaf in _named(value, name):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            yield path, torch.view_as_real(leaf.resolve_conj())
        elif isinstance(leaf, Tensor):
            yield path, leaf if leaf.is_floating_point() else leaf.to(torch.float64)
        elif isinstance(leaf, (bool, int, float)):
            yield path, torch.tensor(float(leaf), dtype=torch.float64)


def _named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything inside tuples, lists, mappings and dataclasses by its path; `0` for what lies in none."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        yield name or "0", value
        return
    for key, inner in items:
        yield from _named(inner, f"{name}.{key}" if name else str(key))


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in `forward`; extra positional ones by their number."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        flat.update(value) if kind is inspect.Parameter.VAR_KEYWORD else flat.update({name: value})
    return flat


def sample_indices(numel: int, elements: int) -> Tensor:
    """Fixed, spread-out positions in a flat tensor of `numel` -> (min(elements, numel),) int64, ascending."""
    if elements >= numel:
        return torch.arange(numel)
    step = max(1, int(numel * 0.6180339887))
    while math.gcd(step, numel) != 1:  # coprime: no position comes twice
        step += 1
    return (torch.arange(elements) * step % numel).sort().values


@contextmanager
def listen(
    module: nn.Module,
    wanted: Callable[[str], bool],
    sink: Callable[[str, str, str, Tensor], None],
    dtypes: Dtypes | None = None,
) -> Iterator[set[str]]:
    """Call `sink(key, path, kind, tensor)` for inputs and outputs of wanted submodules; yields the paths that ran.

    Inputs arrive when a module is entered, outputs when it is left; `key` is `<module>#<call>.<in|out>.<name>`.
    """
    calls: dict[str, int] = {}
    open_calls: dict[str, list[int]] = {}
    ran: set[str] = set()
    handles = []

    def enter(path: str, keep: bool) -> Callable[..., None]:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ran.add(path)
            if not keep:
                return
            index = calls[path] = calls.get(path, -1) + 1
            open_calls.setdefault(path, []).append(index)
            if dtypes is not None:
                dtypes.stack.append(path)
            given = bind(m, args, kwargs)
            for name, tensor in tensors_of(_distinct(given) if isinstance(m, WHOLE) else given):
                sink(f"{path}#{index}.in.{name}", path, "in", tensor)

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            index = open_calls[path].pop()
            if dtypes is not None:
                dtypes.stack.pop()
            for name, tensor in tensors_of(out[:1] if isinstance(m, WHOLE) and isinstance(out, tuple) else out):
                sink(f"{path}#{index}.out.{name}", path, "out", tensor)

        return hook

    for path, child in module.named_modules():
        keep = wanted(path)
        handles.append(child.register_forward_pre_hook(enter(path, keep), with_kwargs=True))
        if keep:
            handles.append(child.register_forward_hook(leave(path), with_kwargs=True))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


# Modules that compute with their children's weights without calling them: compared as one.
WHOLE = (nn.MultiheadAttention,)


def _distinct(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without those that are the same tensor as an earlier one."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    first = {id(value): name for name, value in reversed(tensors.items())}
    return {name: value for name, value in tensors.items() if first[id(value)] == name}


@dataclasses.dataclass
class Recording:
    """Tensors by key with their events in order, plus free metadata; what a trace file holds."""

    meta: dict[str, Any]
    events: list[Event] = dataclasses.field(default_factory=list)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def add(
        self, key: str, shape: torch.Size, dtype: str, low: Tensor, high: Tensor, losses: Mapping[str, Tensor] = {}
    ) -> None:
        """Store flat samples `low` (float32) and `high` (float64); a tensor equal to an earlier one refers to it.

        Of the runs in lossy dtypes, `losses`, only the distance from `high` is kept.
        """
        delta = (high - low.double()).float()
        digest = hashlib.sha256(low.numpy().tobytes() + delta.numpy().tobytes()).hexdigest()
        stored = self._by_digest.setdefault(digest, key)
        if stored == key:
            self.tensors[key], self.tensors[key + "|delta"] = low, delta
        noise, peak = (float(t.abs().max()) if t.numel() else 0.0 for t in (delta, low))
        lost = {name: _distance(values.double(), high) for name, values in losses.items()}
        self.events.append(Event(key, tuple(shape), dtype, low.numel(), stored, noise, peak, lost))

    def __post_init__(self) -> None:
        self._by_digest: dict[str, str] = {}

    def extend(self, other: Recording) -> None:
        """Take in what another recording holds of other passes."""
        for event in other.events:
            low = other.tensors[event.stored]
            self.add(
                event.key,
                torch.Size(event.shape),
                event.dtype,
                low,
                low.double() + other.tensors[event.stored + "|delta"].double(),
            )
            self.events[-1].losses = event.losses
        for key in ("notes", "draws"):
            if other.meta.get(key):
                self.meta[key] = sorted({*self.meta.get(key, []), *other.meta[key]})

    def save(self, path: Path) -> None:
        """Write the trace; it appears complete or not at all."""
        document = {**self.meta, "schema": SCHEMA, "events": [e.row() for e in self.events]}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            metadata = {"trace": json.dumps(document, separators=(",", ":"))}
            partial.write_bytes(save(self.tensors, metadata=metadata))  # save_file would make it private to the user
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@torch.no_grad()
def record(
    module: nn.Module,
    passes: Mapping[str, tuple[Call, Mapping[str, Tensor]]],
    watches: Sequence[Watch],
    meta: Mapping[str, Any],
    *,
    seed: int = 0,
    double: bool = True,
    dtypes: Sequence[str] = (),
    exact: Exact | None = None,
) -> Recording:
    """Run every pass of `module` in float32 and float64 and keep what the first matching watch says.

    Every run starts from the same global random numbers and gets inputs of its own; that it drew such numbers or
    changed its inputs stands in the trace's notes.

    Args:
        passes: name -> (function that runs the module on named float32 inputs, the inputs).
        watches: the first whose pattern matches a module's path decides; modules that none matches are not recorded.
        meta: written into the trace: where the module and its weights came from.
        seed: of the global generators before each run.
        dtypes: lossy ones (`bfloat16`) to run it in too; the trace keeps how far each of them is from float64.
        double: whether the module can run in float64; otherwise the trace says that it did not (`float64: false`).
        exact: see `float64`.
    """

    def watch_of(path: str) -> Watch | None:
        return next((w for w in watches if w.matches(path)), None)

    module.eval()
    recording = Recording(dict(meta))
    casts: dict[str, set[str]] = {}
    ran: set[str] = set()
    singles: set[str] = set()
    notes: list[str] = []
    for name, (call, inputs) in passes.items():
        seeded(seed)
        before, own = _generators(), {k: v.clone() for k, v in inputs.items()}
        seen, computed, paths = _run(module, call, own, watch_of, double=False)
        notes += _liberties(name, before, inputs, own)
        again = seen
        if double:
            seeded(seed)
            again, mixed, _ = _run(
                module, call, {k: v.clone() for k, v in inputs.items()}, watch_of, double=True, exact=exact
            )
            singles |= mixed.keys()
        rough = {}
        for dtype in dtypes:
            seeded(seed)
            own = {k: v.clone() for k, v in inputs.items()}
            with lossy(module, getattr(torch, dtype)):
                rough[dtype], _, _ = _run(module, call, own, watch_of, double=False, dtype=dtype)
        if list(seen) != list(again):
            raise RuntimeError(f"pass {name}: float32 and float64 took different paths: {set(seen) ^ set(again)}")
        for path, found in computed.items():
            casts.setdefault(path, set()).update(found)
        ran |= paths
        for key, value in inputs.items():
            single = value.reshape(-1).float()
            kind = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
            high = single if value.is_floating_point() else value.reshape(-1)  # token ids need more than 24 bits
            recording.add(f"{name}/=.in.{key}", value.shape, kind, single, high.double())
        for key, (shape, dtype, value) in seen.items():
            recording.add(
                f"{name}/{key}",
                shape,
                dtype,
                value.float().contiguous(),
                again[key][2].double(),
                {d: run[key][2] for d, run in rough.items()},
            )
    idle = [path for path in owners(module) if path not in ran]
    recording.meta |= {"torch": torch.__version__, "dtype": "float32", "casts": _grouped(casts), "idle": idle}
    recording.meta |= {"notes": notes} if notes else {}
    recording.meta |= {"singles": sorted(singles)} if singles else {}
    recording.meta |= {} if double else {"float64": False}
    return recording


def seeded(seed: int) -> None:
    """The same global random numbers for every run: torch's, Python's and numpy's."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _generators() -> dict[str, bytes]:
    """Where the global generators stand."""
    found = {"torch": torch.get_rng_state().numpy().tobytes(), "Python": repr(random.getstate()).encode()}
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state(legacy=False)["state"]
        found["numpy"] = state["key"].tobytes() + str(state["pos"]).encode()
    return found


def _liberties(
    name: str, before: Mapping[str, bytes], inputs: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """What a run did besides computing: global random numbers drawn, inputs changed."""
    found = []
    now = _generators()
    drawn = [whose for whose in before if before[whose] != now[whose]]
    if drawn:
        whose = " and ".join(f"{name}'s" for name in drawn)
        found.append(f"{name}: it draws from {whose} global random numbers, which were seeded alike for both sides")
    changed = [k for k, v in inputs.items() if not _same(v, own[k])]
    if changed:
        found.append(f"{name}: it changes its input {', '.join(changed)}; every run got its own copy")
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def owner(path: str) -> str:
    """The module whose weights are computed by `path`, where that is a parametrization (`torch.nn.utils`); else it."""
    return f".{path}".partition(".parametrizations.")[0][1:]


def owners(module: nn.Module) -> list[str]:
    """Paths of modules that have parameters of their own, the outermost (empty) among them."""
    whole = tuple(f"{path}." for path, m in module.named_modules() if isinstance(m, WHOLE))
    found = (owner(path) for path, m in module.named_modules() if any(True for _ in m.parameters(recurse=False)))
    return [path for path in dict.fromkeys(found) if not path.startswith(whole)]


def aliases(module: nn.Module) -> dict[str, str]:
    """Further paths of modules that are registered at several places -> the first."""
    return further_names(dict(module.named_modules(remove_duplicate=False)))


def further_names(named: Mapping[str, object]) -> dict[str, str]:
    """Names of what an earlier name has already -> that name."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(thing), name) for name, thing in named.items()}
    return {name: earlier for name, earlier in found.items() if name != earlier}


def plain_modules(module: nn.Module) -> dict[str, str]:
    """Modules that compute without weights and have no parts: path -> class; not those that only hand on."""
    return {
        path: type(m).__name__
        for path, m in module.named_modules()
        if path and not any(True for _ in m.parameters()) and not any(True for _ in m.children())
        if not isinstance(m, (nn.Identity, nn.Dropout))
    }


def attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain settings (eps, heads, theta …) of every submodule, as they are, whatever a config says."""
    found: dict[str, dict[str, Any]] = {}
    for path, child in module.named_modules():
        own = {
            k: v for k, v in vars(child).items()
            if not k.startswith("_") and k != "training" and isinstance(v, (bool, int, float, str))
        }  # fmt: skip
        if "eps" in vars(child) and child.eps is None:  # torch's own norms: what none means
            own["eps"] = torch.finfo(torch.float32).eps
        if own:
            found[path] = own
    return found


def _run(
    module: nn.Module,
    call: Call,
    inputs: Mapping[str, Tensor],
    watch_of: Callable[[str], Watch | None],
    *,
    double: bool,
    dtype: str = "float32",
    exact: Exact | None = None,
) -> tuple[dict[str, tuple[torch.Size, str, Tensor]], dict[str, list[str]], set[str]]:
    """One run -> (shape, dtype and flat samples by key; dtypes computed by module; modules that ran).

    Of a run in float64 the dtypes are float32 alone, where it came in (`Singles`).
    """
    seen: dict[str, tuple[torch.Size, str, Tensor]] = {}

    def keep(key: str, tensor: Tensor, elements: int | None) -> None:
        flat = tensor.detach().reshape(-1)
        flat = flat if elements is None else flat[sample_indices(flat.numel(), elements)]
        seen[key] = (tensor.shape, str(tensor.dtype).removeprefix("torch."), flat.clone())

    def sink(key: str, path: str, kind: str, tensor: Tensor) -> None:
        watch = watch_of(path)
        if watch and (kind == "out" or watch.inputs):
            keep(key, tensor, watch.elements)

    dtypes = Singles() if double else Dtypes()
    kind = torch.float64 if double else getattr(torch, dtype)
    values = {k: v.to(kind) if v.is_floating_point() else v for k, v in inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        if double:
            stack.enter_context(float64(module, exact=exact))
        ran = stack.enter_context(listen(module, lambda path: watch_of(path) is not None, sink, dtypes))
        stack.enter_context(dtypes)
        out = call(module, values)
    for key, value in answers(out):
        keep(f"=.out.{key}", value, None)
    if isinstance(dtypes, Singles):
        return seen, {path: ["float32"] for path in dtypes.mixed}, ran
    return seen, {path: sorted(found) for path, found in dtypes.seen.items()}, ran


def _distance(values: Tensor, truth: Tensor) -> list[float]:
    """Largest and root mean square distance, to three digits."""
    if not values.numel():
        return [0.0, 0.0]
    gap = (values - truth).abs()
    return [float(f"{float(x):.3g}") for x in (gap.max(), gap.square().mean().sqrt())]


def _grouped(casts: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Modules by what they compute in: `float32,float64` -> paths."""
    groups: dict[str, list[str]] = {}
    for path, seen in casts.items():
        groups.setdefault(",".join(sorted(seen)), []).append(path)
    return groups


def file_sha256(path: Path) -> str:
    """The hash of a file's content, read in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as f:  # hashlib.file_digest is newer than the Pythons this file runs in
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Record one module built by `--module file_or_package:function` on the tensors of `--inputs`."""
    parser = argparse.ArgumentParser(description="Record inputs, module outputs and final output of a torch module.")
    parser.add_argument("--module", required=True, help="module:function or file.py:function that returns the module")
    parser.add_argument("--inputs", required=True, type=Path, help="safetensors file; names are forward's arguments")
    parser.add_argument("--call", default="forward", help="method to run (default: forward)")
    parser.add_argument("--watch", action="append", required=True, help="regular expression; append @N to sample N")
    parser.add_argument("--source", required=True, type=Path, help="weights file; the trace is bound to its sha256")
    parser.add_argument("--commit", default="", help="commit of the reference code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", required=True, type=Path)
    options = parser.parse_args(argv)
    where, _, name = options.module.rpartition(":")
    sys.path.insert(0, str(Path(where).parent if where.endswith(".py") else Path.cwd()))
    torch.manual_seed(options.seed)
    module = getattr(importlib.import_module(Path(where).stem if where.endswith(".py") else where), name)()
    watches = []
    for text in options.watch:
        pattern, at, count = text.rpartition("@")
        watches.append(Watch(pattern, int(count)) if at and count.isdigit() else Watch(text))
    meta: dict[str, Any] = {
        "reference": {"name": options.module, "commit": options.commit},
        "source": {"file": options.source.name, "sha256": file_sha256(options.source)},
        "command": " ".join(sys.argv),
        "seed": options.seed,
    }
    call: Call = lambda m, inputs: getattr(m, options.call)(**inputs)  # noqa: E731
    record(module, {options.call: (call, load_file(options.inputs))}, watches, meta).save(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
