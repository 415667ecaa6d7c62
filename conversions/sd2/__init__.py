"""Stable Diffusion 2.x (2.0, 2.1, depth, inpainting, unCLIP, x4 upscaler): layouts, recipes and traces."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    pipeline_classes=(
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionUpscalePipeline",
        "StableUnCLIPPipeline",
        "StableUnCLIPImg2ImgPipeline",
    ),
    components=(
        Component(
            "feature_extractor", "transformers", ("CLIPImageProcessor", "DPTFeatureExtractor", "DPTImageProcessor")
        ),
        Component("scheduler", "diffusers", ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")),
        Component(
            "text_encoder",
            "transformers",
            ("CLIPTextModel",),
            original_files=("open_clip_pytorch_model.*", "open_clip_model.*"),
            original_name="open_clip_model.safetensors",
            original_class="CLIP",
            recipe="conversions.common.clip.recipe:PENULTIMATE",
        ),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component(
            "unet",
            "diffusers",
            ("UNet2DConditionModel",),
            original_files=(
                "v2-1_*-ema-pruned.*",
                "512-*ema.*",
                "768-v-ema.*",
                "x4-upscaler-ema.*",
                "sd21-unclip-*.ckpt",
                "sd_turbo.safetensors",
            ),
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
    cases="conversions.sd2.case:CASES",
    reference="conversions/sd2/reference",
    reference_code=(
        "Stability-AI/generative-models at 0ad7de9a5cb53fd63d6d30a4f385485e72e08597, mlfoundations/open_clip at"
        " 89fb801f1e6087880e951fc8354b8a2077b79c6d"
    ),
    style="Modular",
    style_reason="standard text-to-image",
    shared_pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    ),
    told_by=("unet", "cross_attention_dim", (1024,)),
    license_hint="weights are under the CreativeML Open RAIL++-M license; a port keeps its source's licence",
)
