"""Helios (long video, chunk by chunk): facts of the diffusers layout, in which it was released."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="helios",
    title="Helios",
    pipeline_classes=("HeliosPipeline", "HeliosPyramidPipeline"),
    components=(
        Component("scheduler", "diffusers", ("HeliosScheduler", "HeliosDMDScheduler")),
        Component("text_encoder", "transformers", ("UMT5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component("transformer", "diffusers", ("HeliosTransformer3DModel",)),
        Component("vae", "diffusers", ("AutoencoderKLWan",)),
    ),
    originals=("conversions.helios.original",),
    style="Hybrid",
    style_reason="frames are made chunk after chunk, each with a memory of the ones before",
    license_hint="the code is under Apache-2.0; a port keeps its source's licence",
)
