"""LTX-2, 2.3 and 2.5 (text and image to video with sound): facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    pipeline_classes=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTX2LatentUpsamplePipeline",
        "LTX2VideoDiffusionDecodePipeline",
    ),
    components=(
        Component("audio_scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component(
            "audio_vae",
            "diffusers",
            ("AutoencoderKLLTX2Audio",),
            original_files=(
                "ltx-2.5-audio-vae-*.safetensors",
                "ltx-2-19b-dev*.safetensors",
                "ltx-2-19b-distilled.safetensors",
                "ltx-2.3-22b-dev*.safetensors",
                "ltx-2.3-22b-distilled.safetensors",
                "ltx-2.3-22b-distilled-1.1.safetensors",
            ),
        ),
        Component(
            "connectors",
            "ltx2",
            ("LTX2TextConnectors",),
            original_files=(
                "ltx-2-19b-dev*.safetensors",
                "ltx-2-19b-distilled.safetensors",
                "ltx-2.3-22b-dev*.safetensors",
                "ltx-2.3-22b-distilled.safetensors",
                "ltx-2.3-22b-distilled-1.1.safetensors",
            ),
        ),
        Component("diffusion_decoder", "diffusers", ("LTX2VideoDiffusionDecoderModel",)),
        Component(
            "duration_head",
            "ltx2",
            ("LTX2DurationHead",),
            original_files=("ltx-2.5-duration-head-*.safetensors",),
        ),
        Component("latent_upsampler", "ltx2", ("LTX2LatentUpsamplerModel",)),
        Component("processor", "transformers", ("Gemma3Processor",)),
        Component("prompt_enhancer", "transformers", ("Gemma4ForConditionalGeneration",)),
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("temporal_latent_upsampler", "ltx2", ("LTX2LatentUpsamplerModel",)),
        Component(
            "text_encoder",
            "transformers",
            ("Gemma3ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        ),
        Component("tokenizer", "transformers", ("GemmaTokenizerFast", "GemmaTokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("LTX2VideoTransformer3DModel",),
            original_files=(
                "ltx-2.5-22b-*-transformer-*.safetensors",
                "ltx-2-19b-dev*.safetensors",
                "ltx-2-19b-distilled.safetensors",
                "ltx-2.3-22b-dev*.safetensors",
                "ltx-2.3-22b-distilled.safetensors",
                "ltx-2.3-22b-distilled-1.1.safetensors",
            ),
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLLTX2Video",),
            original_files=(
                "ltx-2.5-video-vae-conv-*.safetensors",
                "ltx-2-19b-dev*.safetensors",
                "ltx-2-19b-distilled.safetensors",
                "ltx-2.3-22b-dev*.safetensors",
                "ltx-2.3-22b-distilled.safetensors",
                "ltx-2.3-22b-distilled-1.1.safetensors",
            ),
        ),
        Component(
            "vocoder",
            "ltx2",
            ("LTX2Vocoder", "LTX2VocoderWithBWE"),
            original_files=(
                "ltx-2-19b-dev*.safetensors",
                "ltx-2-19b-distilled.safetensors",
                "ltx-2.3-22b-dev*.safetensors",
                "ltx-2.3-22b-distilled.safetensors",
                "ltx-2.3-22b-distilled-1.1.safetensors",
            ),
        ),
    ),
    originals=("conversions.ltx2.original", "conversions.ltx2.original_vae"),
    style="Hybrid",
    style_reason=(
        "video and audio latents are packed and denoised together, with text connectors between encoder and transformer"
    ),
    license_hint="the weights are under the LTX-2.x Community License; a port keeps its source's licence",
)
