"""Which values of a config trigger which pitfall of docs/pitfalls.md, and how badly each breaks a port.

A rule looks at one key of one component's config; it knows keys, values and the roles of classes, never a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

_DENOISER = re.compile(r"Transformer\w*Model$|D[i]T\w*Model$")
# Encoders whose last layer is what a pipeline reads.
_WHOLE = re.compile(r"t5|bert|clap|siglip|chinese_clip")
_EXACT = {"gelu", "gelu_python", "gelu_10"}
_TANH = {
    "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu-approximate", "gated-gelu",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a rule may look at.

    Attributes:
        config: the component's config; where a class is known, with its defaults.
        latent_channels: channels of the latents of the autoencoder beside it.
        clip_text_encoders: how many text encoders of CLIP the source holds.
        upcasts: whether the pipeline heeds an autoencoder's `force_upcast`; None where the pipeline is unknown.
    """

    name: str
    class_name: str
    config: Config
    latent_channels: int | None = None
    clip_text_encoders: int = 0
    upcasts: bool | None = None

    @property
    def denoiser(self) -> bool:
        """A diffusion transformer, by its class."""
        return bool(_DENOISER.search(self.class_name)) and "model_type" not in self.config

    @property
    def autoencoder(self) -> bool:
        """An autoencoder, by its class, or by its name where the class is unknown."""
        return not self.denoiser and bool(re.search(r"(?i)autoenc|vae|vqmodel|oobleck", self.class_name or self.name))

    @property
    def model_type(self) -> str:
        """What a config of transformers calls its model."""
        return str(self.config.get("model_type", ""))


When = Callable[[Any, Facts], bool]


def _stated(value: Any, _: Facts) -> bool:
    return value not in (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Rule:
    """`when` on the value of the first of `keys` that a config has triggers the pitfall.

    Attributes:
        weight: 0 to 100; how badly a port breaks where it is overlooked, and so which risk is shown first.
        text: what goes wrong; may depend on the value.
    """

    pitfall: int
    weight: int
    keys: tuple[str, ...]
    text: str | Callable[[Any], str]
    when: When = _stated


def number(value: Any) -> float | None:
    """A number of a config, or None; true and false are none, nor is an integer beyond any float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isinstance(value, float) or value.bit_length() < 1024 else None


def _largest(value: Any) -> float:
    return max((number(item) or 0 for item in (value if isinstance(value, list | tuple) else [value])), default=0)


def _packed(facts: Facts) -> bool:
    """Whether the pipeline packs 2 by 2 latents into a token: the transformer takes 4 times their channels."""
    widths = (facts.config.get("in_channels"), facts.config.get("out_channels"))
    packed = 4 * (facts.latent_channels or 0)
    return facts.denoiser and packed > 0 and packed in widths


def _grouped(value: Any, facts: Facts) -> bool:
    heads = number(facts.config.get("num_attention_heads", facts.config.get("num_heads")))
    return heads is not None and 0 < (number(value) or 0) < heads


def _axes(value: Any) -> bool:
    return isinstance(value, Mapping) and "mrope_section" in value


def _rescaled(value: Any, _: Facts) -> bool:
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, Mapping) else None
    return kind not in (None, "default", "mrope")


def _shifted(value: Any, facts: Facts) -> bool:
    return number(value) not in (None, 1.0) and not facts.config.get("use_dynamic_shifting")


def _inner_layer(value: Any, facts: Facts) -> bool:
    """Whether pipelines take hidden states before the last from such an encoder.

    Of CLIP that is the penultimate layer: in its larger text models, in its smaller one where a second stands beside
    it, and in vision towers without a projection.
    """
    layers = number(value) or 0
    if facts.model_type.startswith("clip"):
        if "vision" in facts.model_type or "Vision" in facts.class_name:
            return layers >= 23 and not facts.class_name.endswith("WithProjection")
        return layers >= 23 or facts.clip_text_encoders > 1
    speaks = re.search(r"(ForCausalLM|ForConditionalGeneration|Model)$", facts.class_name)
    whole = _WHOLE.search(facts.model_type) or "EncoderModel" in facts.class_name
    return facts.name.startswith("text_encoder") and bool(speaks) and not whole and layers >= 12


def _gelu(value: Any) -> str:
    name = str(value)
    kind = "x·sigmoid(1.702x)" if "quick" in name else "tanh" if name in _TANH else "exact" if name in _EXACT else "?"
    return (
        f"this GELU is {kind}; exact and tanh differ by up to 4.7e-4, x·sigmoid(1.702x) from exact by 2.0e-2, "
        "from tanh by 2.1e-2"
    )


RULES: tuple[Rule, ...] = (
    # what the latents mean
    Rule(30, 100, ("scaling_factor",), "latents are multiplied by it after encoding and divided before decoding",
         lambda value, facts: facts.autoencoder and number(value) not in (None, 1.0)),
    Rule(30, 99, ("shift_factor",), "the shift comes before the scale when encoding, after it when decoding"),
    Rule(30, 99, ("latents_mean",), "latents are normalised by channel means and deviations, not by one factor",
         lambda value, _: isinstance(value, list | tuple) and any(value)),
    Rule(30, 99, ("batch_norm_eps",),
         "latents are normalised by a mean and variance stored among the weights, with this epsilon",
         lambda _, facts: facts.autoencoder),
    Rule(43, 96, ("in_channels",),
         "the pipeline packs 2 by 2 latents into a token: (channel, height, width) order differs between codebases",
         lambda _, facts: _packed(facts)),
    Rule(43, 62, ("patch_size", "all_patch_size"),
         "the model embeds patches itself: order in a patch differs between codebases, and between the way in and out",
         lambda value, facts: facts.denoiser and _largest(value) > 1 and not _packed(facts)),
    Rule(9, 50, ("force_upcast",), "where the pipeline runs in float16, it decodes in float32",
         lambda value, facts: value is True and facts.upcasts is True),
    Rule(9, 50, ("force_upcast",), "asks for float32 where the pipeline runs in float16; not every pipeline heeds it",
         lambda value, facts: value is True and facts.upcasts is None),
    Rule(15, 44, ("use_quant_conv", "use_post_quant_conv"), "no 1x1 convolution stands between latents and decoder",
         lambda value, _: value is False),
    # positions
    Rule(36, 92, ("axes_dims_rope", "axes_dim_rope", "axes_dim", "rope_axes_dim", "axes_dims"),
         "rotary positions on several axes: interleaved or split halves, and which axis comes first"),
    Rule(36, 64, ("rope_scaling", "rope_parameters"),
         "rotary positions on several axes (mrope_section): which axis comes first, in pairs or halves",
         lambda value, _: _axes(value)),
    Rule(47, 88, ("rope_theta", "theta"), "the rotary base is not 10000",
         lambda value, facts: number(value) not in (None, 10_000.0) and "model_type" not in facts.config),
    Rule(47, 63, ("rope_theta", "theta"), "the rotary base is not 10000",
         lambda value, facts: number(value) not in (None, 10_000.0) and "model_type" in facts.config),
    Rule(56, 60, ("rope_scaling", "rope_parameters"), "rotary positions are scaled by length", _rescaled),
    Rule(56, 52, ("rope_max_seq_len", "pos_embed_max_size", "pos_embed_seq_len"),
         "positions are cut from a table of this size"),
    # conditioning
    Rule(32, 86, ("guidance_embeds", "guidance_embed"),
         "guidance is an input of the model: no second pass, and guidance_scale 0 is a value, not `unset`"),
    Rule(32, 70, ("guidance_embeds", "guidance_embed"),
         "no guidance input: distilled (one pass) or classifier-free (two)",
         lambda value, _: value is False),
    Rule(3, 86, ("boundary_ratio",), "two denoisers take turns at this share of the timesteps"),
    Rule(21, 84, ("expand_timesteps",), "every token has a timestep of its own"),
    Rule(52, 74, ("num_hidden_layers", "text_config.num_hidden_layers", "num_layers"),
         "a pipeline may read an inner layer's states, or drop the template's first tokens: its code says which",
         lambda value, facts: not facts.model_type.startswith("clip") and _inner_layer(value, facts)),
    Rule(52, 74, ("num_hidden_layers", "num_layers"),
         "pipelines may take the penultimate layer's states, not the last's: the pipeline's code says which",
         lambda value, facts: facts.model_type.startswith("clip") and _inner_layer(value, facts)),
    Rule(46, 54, ("hidden_act", "activation_fn", "hidden_activation", "dense_act_fn", "feed_forward_proj", "act_fn"),
         _gelu, lambda value, _: "gelu" in str(value)),
    Rule(37, 48, ("num_key_value_heads", "num_kv_heads"), "groups of heads share keys: repeat_interleave, not repeat",
         _grouped),
    Rule(54, 46, ("pad_token_id",), "padding and end of text are one token: which position is pooled, depends on it",
         lambda value, facts: value is not None and value == facts.config.get("eos_token_id")),
    Rule(54, 45, ("eos_token_id",), "the config's end of text is 2, the tokenizer's is not: the highest id is pooled",
         lambda value, facts: value == 2 and facts.model_type.startswith("clip") and "vision" not in facts.model_type),
    # small numbers that pass 1e-3
    Rule(45, 68, ("eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_epsilon"),
         "an epsilon other than the usual 1e-6 and 1e-5; a wrong one passes a gate of 1e-3",
         lambda value, _: number(value) not in (1e-6, 1e-5, None)),
    Rule(45, 66, ("qk_norm",), "queries and keys are normalised: by head or across heads, with an epsilon of its own"),
    Rule(60, 72, ("attention_scale", "softmax_scale", "query_pre_attn_scalar", "attn_logit_softcapping"),
         "attention is not scaled by 1/sqrt(head_dim)"),
    Rule(49, 50, ("flip_sin_to_cos", "freq_shift", "downscale_freq_shift", "frequency_embedding_size"),
         "the timestep's sines: order, frequency shift and scale have variants",
         lambda value, _: value is not None),
    # schedulers
    Rule(27, 80, ("use_dynamic_shifting",),
         "the schedule depends on the number of image tokens, counted after packing; a constant `shift` is not used"),
    Rule(28, 79, ("shift",), "sigmas are shifted; a caller that shifts its own shifts twice", _shifted),
    Rule(28, 79, ("flow_shift",), "sigmas are shifted; a caller that shifts its own shifts twice",
         lambda value, facts: _shifted(value, facts) and facts.config.get("use_flow_sigmas", True) is not False),
    Rule(29, 82, ("prediction_type",), "the model predicts a velocity or the sample, not noise",
         lambda value, _: value in ("v_prediction", "sample", "flow_prediction")),
    Rule(17, 78, ("rescale_betas_zero_snr",), "the last timestep has no signal left"),
    Rule(2, 56, ("timestep_spacing", "steps_offset"), "which timesteps are taken, and whether they are whole numbers",
         lambda value, _: value not in (None, 0, "linspace")),
    Rule(2, 58, ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), "sigmas are respaced"),
    Rule(31, 42, ("solver_order",), "a multistep solver keeps earlier steps: 4 steps may agree where 8 do not",
         lambda value, _: (number(value) or 0) > 1),
)  # fmt: skip
