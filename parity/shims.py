"""Imports that only a GPU has, and timm's layers, made importable with exact CPU equivalents in plain torch.

Stand-alone with `shims_*.py` (torch and the standard library only). A package that can be imported stays as it is. What
a package's stand-in lacks cannot be imported, and the error names this file.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from parity import shims_cuda as cuda
from parity import shims_engine as engine
from parity import shims_flash as flash
from parity import shims_others as others
from parity import shims_timm as timm
from parity import stubs
from parity.shims_kernels import CALLED, refusing

_FLASH = (
    "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func",
)  # fmt: skip
_UNDONE = ("flash_attn_with_kvcache", "_flash_attn_forward", "_flash_attn_varlen_forward")
_MASKS = (
    "AttentionBias", "LowerTriangularMask", "LowerTriangularFromBottomRightMask", "BlockDiagonalMask",
    "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask",
)  # fmt: skip
_LAYERS = ("Attention", "DropPath", "Mlp", "PatchEmbed", "to_2tuple", "trunc_normal_")
_NORMS = ("FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm")
# Arguments of `op=`, which choose a kernel and no arithmetic.
_OPS = (
    "AttentionOp", "AttentionOpBase", "AttentionOpDispatch", "MemoryEfficientAttentionOp",
    "MemoryEfficientAttentionCutlassOp", "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp",
)  # fmt: skip

VERSIONS = {
    "flash_attn": "2.8.3",
    "flash_attn_interface": "3.0.0",
    "xformers": "0.0.30",
    "apex": "0.1",
    "timm": "1.0.0",
    "transformer_engine": "2.0.0",
    "kernels": "0.10.0",
}
CUDA = "cuda"  # no package: the device
# flash_attn_interface is prepared on demand only: projects prefer it, and its answer changed between its versions.
USUAL = ("flash_attn", "xformers", "apex", "timm", "transformer_engine", "kernels", CUDA)


def install(names: Iterable[str] | None = None) -> list[str]:
    """Make stand-ins importable -> the packages that were not there and now are.

    Args:
        names: of `VERSIONS`, or `cuda` for the device; `flash_attn==2.6` asks for the conventions of a version. None:
            all but flash_attn_interface.

    Raises:
        ValueError: there are no stand-ins for such a package or version.
    """
    made = []
    for text in USUAL if names is None else names:
        name, _, version = text.partition("==")
        if text == CUDA:
            made += [CUDA] if cuda.install() else []
            continue
        if name not in VERSIONS:
            raise ValueError(f"parity/shims.py has no stand-in for {name!r}; it has {', '.join(VERSIONS)}, {CUDA}")
        if name == "flash_attn" and version and _numbers(version) < (2, 1):
            raise ValueError("parity/shims.py: flash_attn before 2.1 aligns causal masks otherwise")
        if _importable(name):
            continue
        for path, content in _contents(name, version or VERSIONS[name]).items():
            _add(path, content)
        sys.meta_path.append(_Absent(name))
        made.append(name)
    return made


def used() -> list[str]:
    """Functions and classes whose stand-ins were called, by the paths of the real ones."""
    return sorted(CALLED)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _importable(name: str) -> bool:
    """Whether the real package works; one that is installed and broken leaves nothing behind."""
    there = False
    with suppress(Exception):  # a kernel library that is missing or of another CUDA raises whatever it likes
        there = importlib.import_module(name).__file__ is not None  # a folder of that name, without code, is none
    if not there:
        for path in [p for p in sys.modules if p == name or p.startswith(name + ".")]:
            del sys.modules[path]
    return there


def _contents(name: str, version: str) -> dict[str, dict[str, Any]]:
    """Module path -> what stands in it."""

    def of(module: ModuleType, names: Sequence[str]) -> dict[str, Any]:
        return {n: getattr(module, n) for n in names}

    if name == "flash_attn":
        undone = {n: refusing(f"flash_attn.flash_attn_interface.{n}") for n in _UNDONE}
        padding = of(flash, ("index_first_axis", "unpad_input", "pad_input"))
        if _numbers(version) < (2, 7):
            padding["unpad_input"] = lambda *given: flash.unpad_input(*given)[:4]
        norms = of(flash, ("layer_norm_fn", "rms_norm_fn", "RMSNorm"))
        return {
            "flash_attn": {**of(flash, _FLASH), "__version__": version, _UNDONE[0]: undone[_UNDONE[0]]},
            "flash_attn.flash_attn_interface": {**of(flash, _FLASH), **undone},
            "flash_attn.bert_padding": padding,
            "flash_attn.layers": {},
            "flash_attn.layers.rotary": of(flash, ("apply_rotary_emb",))
            | {"apply_rotary_emb_func": flash.apply_rotary_emb},
            "flash_attn.ops": {},
            "flash_attn.ops.rms_norm": of(flash, ("rms_norm", "RMSNorm")),
            "flash_attn.ops.triton": {},
            "flash_attn.ops.triton.layer_norm": norms,
            "flash_attn.ops.activations": of(flash, ("swiglu",)),
        }
    if name == "flash_attn_interface":
        exact = {"flash_attn_func": flash.flash_3, "flash_attn_varlen_func": flash.flash_3_varlen}
        return {name: {**exact, "flash_attn_with_kvcache": refusing(f"{name}.flash_attn_with_kvcache")}}
    if name == "kernels":
        return {name: {"__version__": version, "get_kernel": _hub_kernel}}
    if name == "xformers":
        masks, attention = of(others, _MASKS), of(others, ("memory_efficient_attention",))
        ops = dict.fromkeys(_OPS, (None, None))
        fmha = {**attention, **masks, **ops}
        return {
            "xformers": {"__version__": version},
            "xformers.ops": {**fmha, **of(others, ("unbind", "swiglu", "SwiGLU"))},
            "xformers.ops.fmha": fmha,
            "xformers.ops.fmha.attn_bias": masks,
        }
    if name == "timm":
        layers = of(timm, _LAYERS)
        paths = ("timm.layers", "timm.models", "timm.models.layers", "timm.models.vision_transformer")
        return {"timm": {"__version__": version}, **dict.fromkeys(paths, layers)}
    if name == "transformer_engine":
        norms, attention = of(engine, ("LayerNorm", "RMSNorm")), of(engine, ("DotProductAttention",))
        rotary = of(engine, ("apply_rotary_pos_emb",))
        return {
            name: {"__version__": version},
            f"{name}.pytorch": {**norms, **attention},
            f"{name}.pytorch.attention": {**attention, **rotary},
            f"{name}.pytorch.attention.rope": rotary,
        }
    norms = of(others, _NORMS)
    return {"apex": {}, "apex.normalization": norms, "apex.normalization.fused_layer_norm": norms}


def _hub_kernel(repo_id: str, *args: Any, **kwargs: Any) -> ModuleType:
    """`kernels.get_kernel`: what the hub's flash attention does; ModuleNotFoundError for any other kernel."""
    kind = repo_id.rpartition("/")[2].replace("_", "-")
    if not re.fullmatch(r"(vllm-)?flash-attn[23]?", kind):
        raise ModuleNotFoundError(
            f"porter's CPU stand-in (parity/shims.py) of kernels has no {repo_id}", name="kernels"
        )
    name = "flash_attn_interface" if kind.endswith("3") else "flash_attn"
    module = ModuleType(repo_id, "A CPU stand-in of porter: parity/shims.py.")
    vars(module).update(_contents(name, VERSIONS[name])[name])
    return module


def _add(path: str, content: dict[str, Any]) -> None:
    """Put a module into `sys.modules`, and into its package."""
    module = ModuleType(path, "A CPU stand-in of porter: parity/shims.py.")
    module.__spec__ = ModuleSpec(path, None, origin=stubs.STAND_IN, is_package=True)
    # Stands in `cannot import name … from 'flash_attn' (…)`, where Python shows the file.
    module.__file__ = f"porter's CPU stand-in of {path}, parity/shims.py"
    module.__path__ = []
    vars(module).update(content)
    sys.modules[path] = module
    parent, _, name = path.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)


class _Absent(MetaPathFinder):
    """Says of a stand-in's missing module that it is the stand-in that lacks it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.startswith(self.name + ".") and not stubs.stubbed(self.name):
            raise ModuleNotFoundError(f"porter's CPU stand-in (parity/shims.py) has no {fullname}", name=fullname)
