"""What a port is likely to get wrong, told from the configs: the pitfalls that this model's own values trigger.

Numbers are those of the pitfall catalogue in docs/pitfalls.md; the rules are in `pitfalls.py`. Defaults come from the
class that will read the config (`defaults.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from porter.core.defaults import ClassSource, Computed
from porter.core.pitfalls import RULES, Config, Facts

# Weights of what no rule of pitfalls.py finds.
_NOISY_STEP, _KEPT, _STATEFUL_STEP, _LEFT_OUT, _IGNORED, _UNMET = 57, 65, 41, 20, 10, 100


@dataclass(frozen=True)
class Risk:
    """One thing to look at.

    Attributes:
        component: the component whose config says so.
        pitfall: number in the catalogue.
        key: the config key; `text_config.<key>` where it stands inside one.
        value: its value.
        text: what goes wrong where it is overlooked.
    """

    component: str
    pitfall: int
    key: str
    value: Any
    text: str


@dataclass(frozen=True)
class Part:
    """One component.

    Attributes:
        source: its class, for defaults and float32-keep modules; None where it is not installed.
    """

    name: str
    class_name: str | None
    config: Config
    source: ClassSource | None = None


# Classes whose step draws noise, or keeps state between steps.
_STATEFUL = re.compile(r"(Multistep|UniPC|LMS|PNDM|DEIS|Heun|KDPM2)")
_NOISY = re.compile(r"(Ancestral|SDE|LCM|TCD|DDPM)")
_SENSITIVE = re.compile(
    r"(eps|norm|theta|rope|axes|scal|shift|act|qk|bias|patch|guidance|mean|std|beta|prediction|interpol|flip|freq|mask)"
)
# Values that change nothing.
_HARMLESS = (None, False, 0, 1, "", "default", "none")
# What a model was trained with, and a scheduler's config may leave to its class.
_SCHEDULE = ("prediction_type", "beta_schedule", "timestep_spacing")


def risks_of(name: str, class_name: str | None, config: Config, source: ClassSource | None) -> list[Risk]:
    """The risks of one component alone; see `risks_of_all`."""
    return risks_of_all([Part(name, class_name, config, source)])


def risks_of_all(parts: Sequence[Part], *, upcasts: bool | None = None, whole: bool = False) -> list[Risk]:
    """The risks of a pipeline's components, those first that break a port most.

    Args:
        upcasts: whether the pipeline heeds an autoencoder's `force_upcast`; None where the pipeline is unknown.
        whole: whether the configs of all its encoders are here.
    """
    pipelines: dict[str, list[Part]] = {}  # a source may hold several, each in a folder of its own
    for part in parts:
        pipelines.setdefault(part.name.rpartition("/")[0], []).append(part)
    found = [weighed for together in pipelines.values() for weighed in _risks_within(together, upcasts)]
    if whole:
        found = [weighed for together in pipelines.values() for weighed in _unmet(together)] + found
    return [risk for _, risk in sorted(found, key=lambda weighed: -weighed[0])]


def _risks_within(parts: Sequence[Part], upcasts: bool | None) -> Iterator[tuple[int, Risk]]:
    """The risks of components that work together, with their weights."""
    clips = sum(part.config.get("model_type") == "clip_text_model" for part in parts)
    around = Facts("", "", {}, latent_channels=_latent_channels(parts), clip_text_encoders=clips, upcasts=upcasts)
    for part in parts:
        yield from _weighed(part, around)


def _unmet(parts: Sequence[Part]) -> Iterator[tuple[int, Risk]]:
    """U-Nets whose cross-attention takes a width that no encoder beside them gives, alone or with others."""
    widths = [width for part in parts if part.config.get("model_type") and (width := _encoded(part))]
    reached = {0}
    for each in widths:
        reached |= {before + width for before in reached for width in each}
    for part in parts:
        taken = part.config.get("cross_attention_dim")
        plain = "UNet" in (part.class_name or "") and not part.config.get("encoder_hid_dim")
        if plain and widths and isinstance(taken, int) and taken not in reached:
            theirs = ", ".join(map(str, sorted({width for each in widths for width in each})))
            text = f"no encoder here gives that width (theirs: {theirs}): a denoiser or an encoder of another model"
            yield _UNMET, Risk(part.name, 7, "cross_attention_dim", taken, text)


def _encoded(part: Part) -> set[int]:
    """The widths in which an encoder can answer."""
    full = _full(part)
    keys = (
        "hidden_size",
        "d_model",
        "projection_dim",
        "project_dim",
        "text_config.hidden_size",
        "text_config.projection_dim",
    )
    return {width for key in keys if isinstance(width := full.get(key), int) and width > 0}


def _latent_channels(parts: Sequence[Part]) -> int | None:
    for part in parts:
        full = _full(part)
        if Facts(part.name, part.class_name or "", full).autoencoder:
            channels = full.get("latent_channels", full.get("z_dim"))
            if isinstance(channels, int):
                return channels
    return None


def _full(part: Part) -> dict[str, Any]:
    """A config with its class's literal defaults, and with what its `text_config` says under dotted names."""
    defaults = part.source.defaults if part.source else {}
    given = {key: jsonable(value) for key, value in defaults.items() if not isinstance(value, Computed)}
    inner = part.config.get("text_config")
    nested = {f"text_config.{key}": value for key, value in inner.items()} if isinstance(inner, Mapping) else {}
    return {**given, **nested, **part.config}


def _weighed(part: Part, around: Facts) -> Iterator[tuple[int, Risk]]:
    """The risks of one component, with their weights."""
    full, name, class_name, source = _full(part), part.name, part.class_name or "", part.source
    facts = replace(around, name=name, class_name=class_name, config=full)
    stated = set(part.config) | {key for key in full if key.startswith("text_config.")}
    # The defaults of a diffusers model are what its released weights were trained with, or not: so they count.
    counted = source is not None and source.file.startswith("diffusers/models")
    told: set[str] = set()
    for rule in RULES:
        key = next((key for key in rule.keys if key in stated), None)
        if key is None and (counted or rule.pitfall == 52):
            key = next((key for key in rule.keys if key in full), None)
        if key is None or not rule.when(full[key], facts):
            continue
        told.add(key)
        text = rule.text if isinstance(rule.text, str) else rule.text(full[key])
        left = f"; not in the config: the class's default holds ({source.file})" if source and key not in stated else ""
        yield rule.weight, Risk(name, rule.pitfall, key, full[key], text + left)
    if _STATEFUL.search(class_name):
        text = "the scheduler keeps state between steps: reset it"
        yield _STATEFUL_STEP, Risk(name, 6, "_class_name", class_name, text)
    if _NOISY.search(class_name):
        text = "each step draws noise: from whose generator, in which order"
        yield _NOISY_STEP, Risk(name, 1, "_class_name", class_name, text)
    if source:
        yield from _kept(name, source)
        yield from _against_defaults(part, source, told)


def _kept(name: str, source: ClassSource) -> Iterator[tuple[int, Risk]]:
    if source.keep_in_fp32:
        kept = ", ".join(source.keep_in_fp32)
        text = "these stay float32 whatever the weights' dtype"
        yield _KEPT, Risk(name, 42, "_keep_in_fp32_modules", kept, text)
    if source.keep_from_float16:
        kept = ", ".join(source.keep_from_float16)
        text = "these stay float32 where the model is loaded in float16 (bfloat16 they take)"
        yield _KEPT, Risk(name, 42, "_keep_in_fp32_modules", kept, text)


def _against_defaults(part: Part, source: ClassSource, told: set[str]) -> Iterable[tuple[int, Risk]]:
    """Sensitive keys that the config leaves to the class, and, as one risk, those that the class does not know."""
    if not source.file.startswith("diffusers") or not (source.defaults or source.required):
        return
    for key, default in source.defaults.items():
        if key in part.config or key in told:
            continue
        if source.file.startswith("diffusers/models"):
            harmless = default is not True and jsonable(default) in _HARMLESS  # 1 == True
            matters = not harmless and _SENSITIVE.search(key) is not None
        else:
            matters = source.file.startswith("diffusers/schedulers") and _left_to_scheduler(key, part.config)
        if matters:
            text = f"not in the config: the class's default {default!r} holds ({source.file})"
            yield _LEFT_OUT, Risk(part.name, 12, key, jsonable(default), text)
    unknown = {
        key: value
        for key, value in part.config.items()
        if not key.startswith("_") and key != "quantization_config" and not source.knows(key)
    }
    if unknown:
        first, *more = unknown
        if more:
            text = f"{source.file} takes no such parameters, they are ignored: {', '.join(unknown)}"
            yield _IGNORED, Risk(part.name, 12, f"{first} and {len(more)} more", unknown, text)
        else:
            text = f"{source.file} takes no such parameter: it is ignored"
            yield _IGNORED, Risk(part.name, 12, first, unknown[first], text)


def _left_to_scheduler(key: str, config: Config) -> bool:
    """Whether the schedule hangs on a key that is left out."""
    if key == "shift":
        return not config.get("use_dynamic_shifting")
    if key == "use_dynamic_shifting":  # its constants are given, and yet it is off
        return any(given in config for given in ("base_shift", "max_shift"))
    if key == "flow_shift":
        return bool(config.get("use_flow_sigmas"))
    return key in _SCHEDULE and not config.get("use_flow_sigmas")


def unusual(config: Config, source: ClassSource | None) -> dict[str, tuple[Any, Any]]:
    """Key -> (value, default) where a config differs from its class's literal default."""
    if source is None:
        return {}
    return {
        key: (value, jsonable(source.defaults[key]))
        for key, value in config.items()
        if key in source.defaults and jsonable(value) != jsonable(source.defaults[key])
    }


def jsonable(value: Any) -> Any:
    """A default as JSON has it, so that the two compare: lists for tuples, text for what JSON cannot say."""
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    finite = not isinstance(value, float) or value - value == 0
    return value if finite and isinstance(value, str | int | float | bool | None) else repr(value)
