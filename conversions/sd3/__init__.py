"""Stable Diffusion 3 and 3.5 (medium, large, large turbo): facts of their layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipeline_classes=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("CLIPTextModelWithProjection",)),
        Component("text_encoder_2", "transformers", ("CLIPTextModelWithProjection",)),
        Component("text_encoder_3", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_2", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_3", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("SD3Transformer2DModel",),
            original_files=("sd3_medium*.safetensors", "sd3.5_medium*.safetensors", "sd3.5_large*.safetensors"),
            original_name="sd3.safetensors",
            original_class="MMDiTX",
            recipe="conversions.sd3.recipe:TRANSFORMER",
            native="conversions.sd3.model:SD3Transformer",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKL",),
            original_files=("sd3_vae.safetensors",),
            original_name="sd3_vae.safetensors",
            original_class="AutoEncoder",
            recipe="conversions.common.autoencoder_kl.recipe:AUTOENCODER",
        ),
    ),
    pipeline="conversions.sd3.pipeline:EntryClass",
    native_pipelines=("StableDiffusion3Pipeline",),
    cases="conversions.sd3.case:CASES",
    reference="conversions/sd3/reference",
    reference_code="Stability-AI/sd3.5 at fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a",
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under the Stability AI Community License; a port keeps its source's licence",
)
