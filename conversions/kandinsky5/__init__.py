"""Kandinsky 5.0 (video Lite and Pro, image Lite): facts of the original and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="kandinsky5",
    title="Kandinsky 5.0",
    pipeline_classes=(
        "Kandinsky5T2VPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5I2IPipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Qwen2_5_VLForConditionalGeneration",)),
        Component("text_encoder_2", "transformers", ("CLIPTextModel",)),
        Component("tokenizer", "transformers", ("Qwen2_5_VLProcessor", "Qwen2VLProcessor")),
        Component("tokenizer_2", "transformers", ("CLIPTokenizer",)),
        Component(
            "transformer",
            "diffusers",
            ("Kandinsky5Transformer3DModel",),
            original_files=("kandinsky5lite_*.safetensors", "kandinsky5pro_*.safetensors"),
        ),
        Component("vae", "diffusers", ("AutoencoderKLHunyuanVideo", "AutoencoderKL")),
    ),
    originals=("conversions.kandinsky5.original",),
    style="Modular",
    style_reason="standard text-to-video, text-to-image and their variants with an input image",
    license_hint=(
        "Kandinsky 5.0 is under the MIT licence, its video VAE under Tencent's; a port keeps its source's licence"
    ),
)
