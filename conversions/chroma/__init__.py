"""Chroma: facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="chroma",
    title="Chroma",
    pipeline_classes=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("ChromaTransformer2DModel",),
            original_files=("chroma-unlocked-*.safetensors", "chroma1-*.safetensors"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    originals=("conversions.chroma.original",),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under Apache-2.0",
)
