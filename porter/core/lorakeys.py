"""The names of a LoRA's tensors: what each is, and which modules it may mean, in the forms that trainers write."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_SET = r"(?:\.(?P<set>[A-Za-z_]\w*))?"  # the adapter's name, as PEFT writes it
_ENDS = {
    "a": re.compile(rf"^(?P<stem>.+?)(?:\.lora_(?:A|down){_SET}|\.lora(?:_linear_layer)?\.down)\.weight$"),
    "b": re.compile(rf"^(?P<stem>.+?)(?:\.lora_(?:B|up){_SET}|\.lora(?:_linear_layer)?\.up)\.weight$"),
    "alpha": re.compile(r"^(?P<stem>.+?)(?:\.lora(?:_A|_down)?)?\.alpha$"),
}
# Attention processors of older versions: `attn1.processor.to_q_lora.down.weight`.
_PROCESSOR = re.compile(r"^(?P<at>.+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<end>down|up)\.weight$")
# What other methods write, told by the ends of names alone.
KINDS = {
    "DoRA (a magnitude beside the factors)": r"[._](dora_scale|lora_magnitude_vector)\b",
    "LoHa (a product of two low ranks)": r"[._]hada_\w+$",
    "LoKr (a Kronecker product)": r"[._]lokr_\w+$",
    "OFT (an orthogonal product)": r"[._]b?oft_\w+$",
    "a middle factor (Tucker)": r"[._]lora_mid\b",
    "differences of whole weights or biases": r"\.(diff|diff_b|set_weight|reshape_weight|w_norm|b_norm)$",
    "biases of factors": r"\.lora\w*(\.\w+)?\.bias$",
    "factors of embeddings": r"\.lora_embedding_[AB]\b",
    "factors of an attention processor of its own": r"\.processor\.",
    "GLoRA": r"\.[ab][12]\.weight$",
    "IA³": r"\.ia3_l\b|\.on_input$",
    "a control network": r"^lora_controlnet$",
}
PEFT = "base_model.model."
# Beginnings of keys → the component that they say; None is the model that predicts.
_DOTTED: tuple[tuple[str, str | None], ...] = (
    ("model.diffusion_model.", None), ("diffusion_model.", None),
    ("transformer.", "transformer"), ("transformer_2.", "transformer_2"), ("unet.", "unet"), ("prior.", "prior"),
    ("text_encoder.", "text_encoder"), ("text_encoder_2.", "text_encoder_2"), ("text_encoder_3.", "text_encoder_3"),
)  # fmt: skip
_FLAT: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", None), ("lora_transformer_", None), ("lycoris_", None), ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te3_", "text_encoder_3"),
)  # fmt: skip
_ENCODER = re.compile(r"^text_encoders\.\w+\.(?:transformer|model)\.(?P<module>.+)$")  # the name is a model's
ENCODERS = "text_encoder*"  # the text encoder whose weights the factors fit
_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "lora_unet_")


@dataclass(frozen=True)
class Place:
    """One reading of a key: which module of which component.

    Attributes:
        component: as the key says it; None: the model that predicts; `ENCODERS`: whichever text encoder fits.
        module: its name, `flat` where dots became underscores.
        original: whether writers of this form use the original layout's names.
    """

    component: str | None
    module: str
    flat: bool = False
    original: bool = False


def role(name: str) -> tuple[str, str, str | None]:
    """What a tensor is, its stem, and the adapter that its name names; no role where it is none of a LoRA's."""
    if match := _PROCESSOR.match(name):
        layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
        return "a" if match["end"] == "down" else "b", f"{match['at']}.{layer}", None
    for part, pattern in _ENDS.items():
        if match := pattern.match(name):
            return part, match["stem"], match.groupdict().get("set")
    return "", "", None


def places(stem: str) -> tuple[Place, ...]:
    """The readings of a key without its end: `transformer.blocks.0.to_q`, `lora_unet_blocks_0_to_q`."""
    for prefix, component in _FLAT:  # no component of a pipeline is called so
        if stem.startswith(prefix):
            said = Place(component, stem[len(prefix) :], True, prefix in _ORIGINAL)
            return (said,) if component is None else (said, replace(said, component=ENCODERS))
    if match := _ENCODER.match(stem):
        return (Place(ENCODERS, match["module"]),)
    stem = stem.removeprefix(PEFT)
    ways = [Place(None, stem)]
    for prefix, component in _DOTTED:
        if stem.startswith(prefix):
            inside = stem[len(prefix) :].removeprefix(PEFT)
            ways = [Place(component, inside, False, prefix in _ORIGINAL), *ways]
    return tuple(ways)
