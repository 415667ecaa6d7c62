"""HunyuanVideo 1.5 (text and image to video): facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="hunyuanvideo15",
    title="HunyuanVideo 1.5",
    pipeline_classes=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    components=(
        Component("feature_extractor", "transformers", ("SiglipImageProcessor",)),
        Component("guider", "diffusers", ("ClassifierFreeGuidance",)),
        Component("image_encoder", "transformers", ("SiglipVisionModel",)),
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Qwen2_5_VLTextModel",)),
        Component("text_encoder_2", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        Component("tokenizer_2", "transformers", ("ByT5Tokenizer",)),
        Component("transformer", "diffusers", ("HunyuanVideo15Transformer3DModel",)),
        Component("vae", "diffusers", ("AutoencoderKLHunyuanVideo15",)),
    ),
    originals=("conversions.hunyuanvideo15.original",),
    style="Modular",
    style_reason="standard text-to-video and text+image-to-video with a second text encoder for quoted glyphs",
    license_hint=(
        "the weights are under the Tencent Hunyuan Community License of HunyuanVideo 1.5, which does not apply in"
        " the European Union, the United Kingdom and South Korea; a port keeps its source's licence"
    ),
)
