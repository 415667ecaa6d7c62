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
            original_name="lumina_2_model.safetensors",
            original_class="NextDiT",
            recipe="conversions.lumina2.recipe:TRANSFORMER",
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    cases="conversions.lumina2.case:CASES",
    reference="conversions/lumina2/reference",
    reference_code="Alpha-VLLM/Lumina-Image-2.0 at 4a4d6f856115db07e8ae127280ebcc3d9f65004e",
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="Lumina-Image-2.0 weights are under Apache-2.0, its text encoder under Gemma's terms",
)
