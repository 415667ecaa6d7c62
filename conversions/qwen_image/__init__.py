"""Qwen-Image (base, Edit, Edit-Plus, Layered, 2.1): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    pipeline_classes=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImage21Pipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component(
            "text_encoder",
            "transformers",
            ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
            original_files=("qwen_2.5_vl_7b*.safetensors",),
        ),
        Component("tokenizer", "transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        Component("processor", "transformers", ("Qwen2VLProcessor", "Qwen3VLProcessor")),
        Component(
            "transformer",
            "diffusers",
            ("QwenImageTransformer2DModel", "QwenImage21Transformer2DModel"),
            original_files=(
                "qwen_image_bf16.safetensors",
                "qwen_image_fp8_*.safetensors",
                "qwen_image_edit_*.safetensors",
                "qwen_image_layered_bf16.safetensors",
                "qwen_image_layered_fp8*.safetensors",
            ),
            original_name="qwen_image_bf16.safetensors",
            original_class="QwenImageTransformer2DModel",
            recipe="conversions.qwen_image.recipe:TRANSFORMER",
            native="conversions.qwen_image.model:QwenImageTransformer",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"),
            original_files=("qwen_image_vae.safetensors", "qwen_image_layered_vae.safetensors"),
            original_name="qwen_image_vae.safetensors",
            original_class="wan:WanVAE_",  # a file is told to be ours by its name, or by what lies beside it
            recipe="conversions.qwen_image.vae_recipe:AUTOENCODER",
        ),
    ),
    pipeline="conversions.qwen_image.pipeline:EntryClass",
    bench="conversions.qwen_image.bench:CASES",
    native_pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    cases="conversions.qwen_image.case:CASES",
    reference="conversions/qwen_image/reference",
    reference_code=(
        "modelscope/DiffSynth-Studio at fed7b18fac2ed4cb802796eec91970e7659bccde; of the autoencoder Wan-Video/Wan2.1"
        " at 9737cba9c1c3c4d04b33fcad41c111989865d315"
    ),
    style="Modular",
    style_reason="text+image-to-image: pictures enter through the text encoder and as latents, no tokens are generated",
    license_hint="Qwen-Image, -Edit and -Layered weights are under Apache-2.0; look up the card of later releases",
)
