"""What a port is likely to get wrong, told from the configs: the pitfalls that this model's own values trigger.

Numbers are those of the pitfall catalogue in docs/pitfalls.md. A rule looks at one key of one component's config; it
knows keys and values, never a family. Defaults come from the class that will read the config (`defaults.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from porter.core.defaults import ClassSource

_UNSET = object()
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Risk:
    """One thing to look at.

    Attributes:
        component: the component whose config says so.
        pitfall: number in the catalogue.
        key: the config key.
        value: its value.
        text: what goes wrong where it is overlooked.
    """

    component: str
    pitfall: int
    key: str
    value: Any
    text: str


@dataclass(frozen=True)
class Rule:
    """`when(value, config)` on the first of `keys` that the config has triggers the pitfall."""

    pitfall: int
    keys: tuple[str, ...]
    text: str
    when: Callable[[Any, Config], bool] = lambda value, _: value not in (None, False, 0, "", [], {})


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _differs(expected: float) -> Callable[[Any, Config], bool]:
    return lambda value, _: (n := _number(value)) is not None and n != expected


def _grouped(value: Any, config: Config) -> bool:
    heads = _number(config.get("num_attention_heads", config.get("num_heads")))
    keys = _number(value)
    return heads is not None and keys is not None and 0 < keys < heads


RULES: tuple[Rule, ...] = (
    # what the latents mean
    Rule(30, ("scaling_factor",), "latents are multiplied by it after encoding and divided before decoding; once each"),
    Rule(30, ("shift_factor",), "the shift comes before the scale when encoding, after it when decoding"),
    Rule(30, ("latents_mean",), "latents are normalised by channel means and deviations, not by one factor"),
    Rule(15, ("use_quant_conv", "use_post_quant_conv"), "no 1x1 convolution stands between latents and decoder",
         lambda value, _: value is False),
    Rule(9, ("force_upcast",), "this autoencoder overflows in float16; decode in float32 or bfloat16"),
    Rule(43, ("patch_size",), "tokens are packed patches: (height, width, channel) order differs between codebases",
         lambda value, _: (max((v for v in value if isinstance(v, int)), default=0) if isinstance(value, list)
                           else _number(value) or 0) > 1),
    # positions
    Rule(36, ("axes_dims_rope", "axes_dim", "rope_axes_dim", "axes_dims"),
         "rotary positions on several axes: interleaved or split halves, and which axis comes first"),
    Rule(47, ("rope_theta", "theta"), "the rotary base is not 10000", _differs(10_000.0)),
    Rule(56, ("rope_scaling", "rope_parameters"), "rotary positions are scaled by length"),
    Rule(56, ("rope_max_seq_len", "pos_embed_max_size", "pos_embed_seq_len"),
         "positions are cut from a table of this size"),
    # conditioning
    Rule(32, ("guidance_embeds", "guidance_embed"),
         "guidance is an input of the model: no second pass, and guidance_scale 0 is a value, not `unset`"),
    Rule(32, ("guidance_embeds", "guidance_embed"), "no guidance input: distilled (one pass) or classifier-free (two)",
         lambda value, _: value is False),
    Rule(3, ("boundary_ratio",), "two denoisers take turns at this share of the timesteps"),
    Rule(21, ("expand_timesteps",), "every token has a timestep of its own"),
    Rule(52, ("num_hidden_layers", "num_layers"), "pipelines may take an inner layer's states; which one, is code",
         lambda value, config: str(config.get("model_type", "")).startswith("clip") and (_number(value) or 0) >= 23),
    Rule(46, ("hidden_act", "activation_fn", "hidden_activation", "dense_act_fn", "feed_forward_proj", "act_fn"),
         "GELU exists exactly, with tanh and as x·sigmoid(1.702x); they differ by less than 1e-3",
         lambda value, _: "gelu" in str(value)),
    Rule(37, ("num_key_value_heads", "num_kv_heads"), "groups of heads share keys: repeat_interleave, not repeat",
         _grouped),
    Rule(54, ("pad_token_id",), "padding and end of text are one token: which position is pooled, depends on it",
         lambda value, config: value is not None and value == config.get("eos_token_id")),
    Rule(54, ("eos_token_id",), "the config's end of text is 2, the tokenizer's is not: the highest id is pooled",
         lambda value, config: value == 2 and str(config.get("model_type", "")).startswith("clip")),
    # small numbers that pass 1e-3
    Rule(45, ("eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_epsilon"),
         "an epsilon other than the usual 1e-6 and 1e-5; a wrong one passes a gate of 1e-3",
         lambda value, _: _number(value) not in (1e-6, 1e-5, None)),
    Rule(45, ("qk_norm",), "queries and keys are normalised: by head or across heads, with an epsilon of its own"),
    Rule(60, ("attention_scale", "softmax_scale", "query_pre_attn_scalar", "attn_logit_softcapping"),
         "attention is not scaled by 1/sqrt(head_dim)"),
    Rule(49, ("flip_sin_to_cos", "freq_shift", "downscale_freq_shift", "frequency_embedding_size"),
         "the timestep's sines: order, frequency shift and scale have variants",
         lambda value, _: value is not None),
    # schedulers
    Rule(27, ("use_dynamic_shifting",), "the schedule depends on the number of image tokens: count them after packing"),
    Rule(28, ("shift", "flow_shift"), "sigmas are shifted; a caller that shifts its own shifts twice", _differs(1.0)),
    Rule(29, ("prediction_type",), "the model predicts a velocity or the sample, not noise",
         lambda value, _: value in ("v_prediction", "sample", "flow_prediction")),
    Rule(2, ("timestep_spacing", "steps_offset"), "which timesteps are taken, and whether they are whole numbers",
         lambda value, _: value not in (None, 0, "linspace")),
    Rule(2, ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), "sigmas are respaced"),
    Rule(31, ("solver_order",), "a multistep solver keeps earlier steps: 4 steps may agree where 8 do not",
         lambda value, _: (_number(value) or 0) > 1),
    Rule(17, ("rescale_betas_zero_snr",), "the last timestep has no signal left"),
)  # fmt: skip
# Classes whose step draws noise, or keeps state between steps.
_STATEFUL = re.compile(r"(Multistep|UniPC|LMS|PNDM|DEIS|Heun|KDPM2)")
_NOISY = re.compile(r"(Ancestral|SDE|LCM|TCD|DDPM)")


def risks_of(name: str, class_name: str | None, config: Config, source: ClassSource | None) -> list[Risk]:
    """The risks of one component.

    Args:
        source: its class, for defaults and float32-keep modules; None where it is not installed.
    """
    found = [
        Risk(name, rule.pitfall, key, config[key], rule.text)
        for rule in RULES
        for key in [next((key for key in rule.keys if key in config), None)]
        if key is not None and rule.when(config[key], config)
    ]
    if class_name and _STATEFUL.search(class_name):
        found.append(Risk(name, 6, "_class_name", class_name, "the scheduler keeps state between steps: reset it"))
    if class_name and _NOISY.search(class_name):
        found.append(
            Risk(name, 1, "_class_name", class_name, "each step draws noise: from whose generator, in which order")
        )
    if source:
        if source.keep_in_fp32:
            kept = ", ".join(source.keep_in_fp32)
            found.append(
                Risk(name, 42, "_keep_in_fp32_modules", kept, "these stay float32 whatever the weights' dtype")
            )
        found += _against_defaults(name, config, source)
    return found


_SENSITIVE = re.compile(
    r"(eps|norm|theta|rope|axes|scal|shift|act|qk|bias|patch|guidance|mean|std|beta|prediction|interpol|flip|freq|mask)"
)


def _against_defaults(name: str, config: Config, source: ClassSource) -> Iterable[Risk]:
    """Keys that the class does not know, and sensitive ones that the config leaves to the class."""
    if not source.defaults and not source.required:
        return
    for key in config:
        known = key.startswith("_") or key == "quantization_config" or source.knows(key)
        if not known and source.file.startswith("diffusers"):
            yield Risk(name, 12, key, config[key], f"{source.file} takes no such parameter: it is ignored")
    for key, default in source.defaults.items():
        if default in (None, False) or key in config or not _SENSITIVE.search(key):
            continue
        if source.file.startswith("diffusers/models"):
            yield Risk(
                name,
                12,
                key,
                jsonable(default),
                f"not in the config: the class's default {default!r} holds ({source.file})",
            )


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
