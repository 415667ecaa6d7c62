"""Stable Diffusion XL (base, refiner, inpainting, Turbo): layouts, recipes and traces."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline_classes=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "LEditsPPPipelineStableDiffusionXL",
    ),
    components=(
        Component("scheduler", "diffusers", ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")),
        Component(
            "text_encoder",
            "transformers",
            ("CLIPTextModel",),
            original_files=("clip_l*.safetensors",),
            original_name="clip_l.safetensors",
            original_class="CLIPTextModel",
            recipe="conversions.common.clip.recipe:KEPT",
        ),
        Component(
            "text_encoder_2",
            "transformers",
            ("CLIPTextModelWithProjection",),
            original_files=("open_clip_pytorch_model.*", "open_clip_model.*"),
            original_name="open_clip_model.safetensors",
            original_class="CLIP",
            recipe="conversions.common.clip.recipe:WITH_PROJECTION",
        ),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_2", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component(
            "unet",
            "diffusers",
            ("UNet2DConditionModel",),
            original_files=("sd_xl_base_*.safetensors", "sd_xl_refiner_*.safetensors", "sd_xl_turbo_*.safetensors"),
            original_name="unet.safetensors",
            original_class="UNetModel",
            recipe="conversions.common.unet.recipe:UNET",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKL",),
            original_files=("sdxl_vae*.safetensors", "sdxl.vae.safetensors"),
            original_name="sdxl_vae.safetensors",
            original_class="AutoencoderKL",
            recipe="conversions.common.autoencoder_kl.recipe:AUTOENCODER",
        ),
    ),
    cases="conversions.sdxl.case:CASES",
    reference="conversions/sdxl/reference",
    reference_code=(
        "Stability-AI/generative-models at 0ad7de9a5cb53fd63d6d30a4f385485e72e08597; mlfoundations/open_clip at"
        " 89fb801f1e6087880e951fc8354b8a2077b79c6d"
    ),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint=(
        "base and refiner weights are under the CreativeML Open RAIL++-M license, SDXL-Turbo under a Stability AI"
        " licence; a port keeps its source's licence"
    ),
)
