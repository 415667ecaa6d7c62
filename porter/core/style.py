"""The style of a native port, by the table of situations: the first row that holds, with the evidence for it."""

from __future__ import annotations

import re

from porter.core.family import Style, families
from porter.core.libraries import pipeline_generates
from porter.core.survey import Survey

# Classes that rewrite or caption a prompt, or emit tokens one by one, before the first denoising step.
_AUTOREGRESSIVE = re.compile(r"ForConditionalGeneration$|ForCausalLM$|LMHeadModel$|VLModel$|ImageTextToText")
# The same classes where they only encode: their hidden states are read in one pass.
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def style_of(found: Survey) -> tuple[Style | None, str]:
    """(style, why) of a native port of what was found; no style of what is no single model."""
    if found.places:
        return None, "several pipelines, each with its own: --subfolder plans one of them"
    if found.factors:
        return None, "factors of a LoRA: their model's"
    writes = pipeline_generates(found.pipeline_class) if found.pipeline_class else None
    plainest = found.family is not None and found.pipeline_class in found.family.pipeline_classes[:1]
    if writes and not plainest:
        return "Hybrid", f"{writes} writes a caption or tokens before denoising ({found.pipeline_class})"
    if found.family:
        if found.pipeline_class and found.pipeline_class != (found.family.pipeline_classes or ("",))[0]:
            return (
                found.family.style,
                f"{found.pipeline_class}, a variant of {found.family.title}: its stages, own callbacks",
            )
        return found.family.style, found.family.style_reason
    own_code = [part.name for part in found.components if part.custom_code]
    talking = next(
        ((part.name, part.class_name) for part in found.components if _AUTOREGRESSIVE.search(part.class_name or "")),
        None,
    )
    if talking and talking[0] not in _ENCODERS:
        return "Hybrid", f"{talking[0]} ({talking[1]}) captions or emits tokens before denoising"
    if own_code:
        return "Hybrid", f"custom steps: {', '.join(own_code)} is code of the repository"
    if talking and writes is None:
        return "Hybrid", f"{talking[1]} can caption or emit tokens before denoising; Modular if it only encodes"
    denoisers = [part.name for part in found.components if re.match(r"(transformer|unet|prior|decoder)", part.name)]
    if len(denoisers) > 2 or {"prior", "decoder"} <= set(denoisers):
        return "Hybrid", f"several denoisers run one after the other: {', '.join(denoisers)}"
    classes = {part.class_name for part in found.components}
    kin = next(
        (f for f in families().values() for p in f.components if p.native and set(p.class_names) & classes), None
    )
    if kin:
        return "Modular", f"a variant of {kin.title}: callbacks only"
    if found.pipeline_class is None and not denoisers and all(part.class_name for part in found.components):
        return "Modular", "no denoiser is here; nothing demands a stage of its own"
    if not found.components or all(part.class_name is None for part in found.components):
        return "Modular", "unknown architecture: nothing is known that would demand a stage of its own"
    roles = [part.name for part in found.components]
    if any(name.startswith("text_encoder") for name in roles) and "vae" in roles:
        return "Modular", "standard text-to-image or -video: encoders, denoiser, decoder"
    return "Modular", "nothing here captions, emits tokens or needs code of its own before denoising"
