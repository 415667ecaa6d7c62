"""LTX-Video 0.9 to 0.9.8 (2B and 13B): facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="ltx",
    title="LTX-Video",
    pipeline_classes=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXLatentUpsamplePipeline",
        "LTXI2VLongMultiPromptPipeline",
    ),
    components=(
        Component(
            "latent_upsampler",
            "ltx",
            ("LTXLatentUpsamplerModel",),
            original_files=("ltxv-spatial-upscaler-*.safetensors", "ltxv-temporal-upscaler-*.safetensors"),
        ),
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("LTXVideoTransformer3DModel",),
            original_files=(
                "ltx-video-2b-*.safetensors",
                "ltxv-2b-*.safetensors",
                "ltxv-13b-*-dev.safetensors",
                "ltxv-13b-*-distilled.safetensors",
                "ltxv-13b-*-fp8.safetensors",
            ),
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLLTXVideo",),
            original_files=(
                "ltx-video-2b-*.safetensors",
                "ltxv-2b-*.safetensors",
                "ltxv-13b-*-dev.safetensors",
                "ltxv-13b-*-distilled.safetensors",
                "ltxv-13b-*-fp8.safetensors",
            ),
        ),
    ),
    originals=(
        "conversions.ltx.original",
        "conversions.ltx.original_vae",
    ),
    style="Modular",
    style_reason="standard text-to-video and text+image-to-video",
    license_hint=(
        "each LTX-Video release carries its own licence, named in its model card; a port keeps its source's licence"
    ),
)
