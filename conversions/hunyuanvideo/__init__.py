"""HunyuanVideo (text and image to video, FramePack, SkyReels V1): facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="hunyuanvideo",
    title="HunyuanVideo",
    pipeline_classes=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoFramepackPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
    components=(
        Component("feature_extractor", "transformers", ("SiglipImageProcessor",)),
        Component("image_encoder", "transformers", ("SiglipVisionModel",)),
        Component("image_processor", "transformers", ("CLIPImageProcessor",)),
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("LlamaModel", "LlavaForConditionalGeneration")),
        Component("text_encoder_2", "transformers", ("CLIPTextModel",)),
        Component("tokenizer", "transformers", ("LlamaTokenizerFast",)),
        Component("tokenizer_2", "transformers", ("CLIPTokenizer",)),
        Component(
            "transformer",
            "diffusers",
            ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
            original_files=("mp_rank_00_model_states.pt", "mp_rank_00_model_states_fp8.pt"),
        ),
        Component("vae", "diffusers", ("AutoencoderKLHunyuanVideo",), original_files=("pytorch_model.pt",)),
    ),
    originals=(
        "conversions.hunyuanvideo.original",
        "conversions.hunyuanvideo.original_vae",
    ),
    style="Modular",
    style_reason="standard text-to-video and text+image-to-video",
    license_hint=(
        "the weights are under the Tencent Hunyuan Community License of HunyuanVideo, which does not apply in the"
        " European Union, the United Kingdom and South Korea; a port keeps its source's licence"
    ),
)
