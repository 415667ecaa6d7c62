"""Mochi 1: facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="mochi",
    title="Mochi 1",
    pipeline_classes=("MochiPipeline",),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component("transformer", "diffusers", ("MochiTransformer3DModel",), original_files=("dit.safetensors",)),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLMochi",),
            original_files=("encoder.safetensors", "decoder.safetensors"),
        ),
    ),
    originals=("conversions.mochi.original",),
    style="Modular",
    style_reason="standard text-to-video",
    license_hint="Mochi 1 is under Apache-2.0; a port keeps its source's licence",
)
