"""What PEFT notes about a LoRA beside its tensors: alpha, ranks, how the scale is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porter.core.errors import BadInputError
from porter.core.files import read_config
from porter.core.strictjson import parse_json

METADATA = "lora_adapter_metadata"  # where diffusers keeps it in a file
CONFIG = "adapter_config.json"  # where PEFT keeps it
_NAME = re.compile(r"\^?[\w-]+(?:\\?\.[\w-]+)*\$?")  # a module's name, or its end: no other regular expression is run
# Settings that change what the factors mean, and the values that leave them plain.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"), "use_dora": (None, False), "lora_bias": (None, False), "bias": (None, "none"),
    "fan_in_fan_out": (None, False), "modules_to_save": (None, []), "trainable_token_indices": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"), "use_qalora": (None, False),
    "layer_replication": (None,), "target_parameters": (None, []), "alora_invocation_tokens": (None,),
    "velora_config": (None,), "kasa_config": (None,), "monteclora_config": (None,), "arrow_config": (None,),
    "use_bdlora": (None, False), "megatron_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one adapter. Patterns: module, or the end of its name → the value that holds there."""

    where: str
    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def scale(self, file: Path, module: str, rank: int) -> float | None:
        """alpha / rank of a module, or alpha / √rank; None where no alpha is said.

        Raises:
            BadInputError: the factors have another rank than the settings say.
        """
        said = _matching(self.ranks, module, self.rank)
        if said is not None and said != rank:
            raise BadInputError(
                f"{file}: the factors of {module} are not those of {self.where}", expected=f"rank {said}",
                found=f"rank {rank}", hint="take both files from one training",
            )  # fmt: skip
        alpha = _matching(self.alphas, module, self.alpha)
        return None if alpha is None else alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def beside(file: Path) -> dict[str | None, Settings]:
    """The settings in adapter_config.json next to a file; nothing where there is none.

    Raises:
        BadInputError: they describe something else than a plain LoRA.
    """
    path = file.parent / CONFIG
    return {None: _read(str(path), read_config(path))} if path.is_file() else {}


def embedded(file: Path, text: str) -> dict[str | None, Settings]:
    """The settings that a file's own metadata holds, by component (`transformer.r`, `text_encoder.lora_alpha`).

    Raises:
        BadInputError: they are no JSON, or describe something else than a plain LoRA.
    """
    where = f"{METADATA} of {file}"
    try:
        document = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise _odd(where, "it is no JSON", str(error)) from None
    if not isinstance(document, dict):
        raise _odd(where, "it is no table", type(document).__name__)
    parts: dict[str | None, dict[str, Any]] = {}
    for key, value in document.items():
        component, dot, name = key.partition(".")
        parts.setdefault(component if dot else None, {})[name if dot else key] = value
    return {component: _read(where, values) for component, values in parts.items()}


def _read(where: str, values: Mapping[str, Any]) -> Settings:
    for key, plain in _PLAIN.items():
        if not any(values.get(key) is each or values.get(key) == each for each in plain):
            raise _odd(where, f"{key} says that this is no plain LoRA", f"{key}: {values[key]!r:.60}")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    numbers = [("r", values.get("r")), ("lora_alpha", values.get("lora_alpha"))]
    for key, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(table, dict) or not all(_NAME.fullmatch(name) for name in table):
            raise _odd(where, f"{key} is no table of modules' names", f"{key}: {table!r:.120}")
        numbers += [(f"{key}: {name}", value) for name, value in table.items()]
    for key, value in numbers:
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e9):
            raise _odd(where, f"{key} is no number above 0", f"{value!r:.60}")
    if values.get("use_rslora") not in (None, True, False):
        raise _odd(where, "use_rslora is neither true nor false", f"{values['use_rslora']!r:.60}")
    return Settings(where, values.get("r"), values.get("lora_alpha"), ranks, alphas, values.get("use_rslora") is True)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that names `module` or its end, as PEFT looks it up."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or (not pattern.startswith("^") and module.endswith("." + name)):
            return value
    return default


def _odd(where: str, what: str, found: str) -> BadInputError:
    return BadInputError(
        f"{where}: {what}", expected="the settings of a plain LoRA", found=found,
        hint="merge it into its model with the tool that trained it, or export it as a plain LoRA",
    )  # fmt: skip
