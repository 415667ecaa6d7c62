"""Stable Diffusion 1.x (and what keeps its shape): layouts, recipes and traces."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipeline_classes=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "LEditsPPPipelineStableDiffusion",
    ),
    components=(
        Component("feature_extractor", "transformers", ("CLIPImageProcessor", "CLIPFeatureExtractor")),
        Component("safety_checker", "stable_diffusion", ("StableDiffusionSafetyChecker",)),
        Component(
            "scheduler", "diffusers", ("PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")
        ),
        Component(
            "text_encoder",
            "transformers",
            ("CLIPTextModel",),
            original_files=("clip_l*.safetensors",),
            original_name="clip_l.safetensors",
            original_class="CLIPTextModel",
            recipe="conversions.common.clip.recipe:KEPT",
        ),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component(
            "unet",
            "diffusers",
            ("UNet2DConditionModel",),
            original_files=("v1-5-pruned*.safetensors", "v1-5-pruned*.ckpt", "sd-v1-*.safetensors", "sd-v1-*.ckpt"),
            original_name="unet.safetensors",
            original_class="UNetModel",
            recipe="conversions.common.unet.recipe:UNET",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKL",),
            original_files=("vae-ft-*.safetensors", "vae-ft-*.ckpt"),
            original_name="vae.safetensors",
            original_class="AutoencoderKL",
            recipe="conversions.common.autoencoder_kl.recipe:AUTOENCODER",
        ),
    ),
    cases="conversions.sd1.case:CASES",
    reference="conversions/sd1/reference",
    reference_code="CompVis/stable-diffusion at 21f890f9da3cfbeaba8e2ac3c425ee9e998d5229",
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under the CreativeML Open RAIL-M license; a port keeps its source's licence",
)
