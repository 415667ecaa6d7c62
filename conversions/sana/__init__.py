"""Sana (0.6B, 1.6B, 1.5, Sprint): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="sana",
    title="Sana",
    pipeline_classes=(
        "SanaPipeline",
        "SanaSprintPipeline",
        "SanaSprintImg2ImgPipeline",
        "SanaPAGPipeline",
        "SanaControlNetPipeline",
    ),
    components=(
        Component(
            "scheduler",
            "diffusers",
            ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"),
        ),
        Component("text_encoder", "transformers", ("Gemma2Model",)),
        Component("tokenizer", "transformers", ("GemmaTokenizerFast", "GemmaTokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("SanaTransformer2DModel",),
            original_files=("sana_*.pth", "sana1.5_*.pth"),
        ),
        Component("vae", "diffusers", ("AutoencoderDC",)),
    ),
    originals=("conversions.sana.original",),
    style="Modular",
    style_reason="standard text-to-image; the instruction before the prompt is text only",
    license_hint="Sana weights are under NVIDIA's licence and Gemma's terms; look up the card of each release",
)
