"""Z-Image (Z-Image, Z-Image-Turbo): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="z_image",
    title="Z-Image",
    pipeline_classes=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Qwen3Model", "Qwen3ForCausalLM")),
        Component("tokenizer", "transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("ZImageTransformer2DModel",),
            original_files=("z_image_*.safetensors",),
            original_name="z_image.safetensors",
            original_class="ZImageTransformer2DModel",
            recipe="conversions.z_image.recipe:TRANSFORMER",
            recipes=(("NextDiT", "conversions.z_image.recipe:SINGLE_FILE"),),
            native="conversions.z_image.model:ZImageTransformer",
        ),
        Component("vae", "diffusers", ("AutoencoderKL",), original_files=("ae.safetensors",)),
    ),
    pipeline="conversions.z_image.pipeline:EntryClass",
    bench="conversions.z_image.bench:CASES",
    native_pipelines=("ZImagePipeline",),
    cases="conversions.z_image.case:CASES",
    reference="conversions/z_image/reference",
    reference_code="Tongyi-MAI/Z-Image at c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e",
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="Z-Image weights are under Apache-2.0",
)
