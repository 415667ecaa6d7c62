"""Lumina-Image 2.0: facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    pipeline_classes=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Gemma2Model",)),
        Component("tokenizer", "transformers", ("GemmaTokenizerFast", "GemmaTokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("Lumina2Transformer2DModel",),
            original_files=("consolidated.00-of-01.pth", "lumina_2_model*.safetensors"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="Lumina-Image-2.0 weights are under Apache-2.0, its text encoder under Gemma's terms",
)
