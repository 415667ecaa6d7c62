"""GLM-Image: facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="glm_image",
    title="GLM-Image",
    pipeline_classes=("GlmImagePipeline",),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("ByT5Tokenizer",)),
        Component("vision_language_encoder", "transformers", ("GlmImageForConditionalGeneration",)),
        Component("processor", "transformers", ("GlmImageProcessor",)),
        Component(
            "transformer",
            "diffusers",
            ("GlmImageTransformer2DModel",),
            native="conversions.glm_image.model:GlmImageTransformer",
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    pipeline="conversions.glm_image.pipeline:EntryClass",
    native_pipelines=("GlmImagePipeline",),
    cases="conversions.glm_image.case:CASES",
    style="Hybrid",
    style_reason="an autoregressive model writes image tokens before the denoising starts",
    license_hint="look up the licence on the card of zai-org/GLM-Image; a port keeps it",
)
