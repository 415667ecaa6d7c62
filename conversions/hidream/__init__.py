"""HiDream-I1 (Full, Dev, Fast): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="hidream",
    title="HiDream-I1",
    pipeline_classes=("HiDreamImagePipeline",),
    components=(
        Component(
            "scheduler",
            "diffusers",
            ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"),
        ),
        Component("text_encoder", "transformers", ("CLIPTextModelWithProjection",)),
        Component("text_encoder_2", "transformers", ("CLIPTextModelWithProjection",)),
        Component("text_encoder_3", "transformers", ("T5EncoderModel",)),
        Component("text_encoder_4", "transformers", ("LlamaForCausalLM",)),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_2", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_3", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component("tokenizer_4", "transformers", ("PreTrainedTokenizerFast", "LlamaTokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("HiDreamImageTransformer2DModel",),
            original_files=("hidream_i1_*.safetensors", "hidream-i1-*.gguf"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    originals=("conversions.hidream.original",),
    style="Modular",
    style_reason="standard text-to-image with four text encoders",
    license_hint="HiDream-I1 weights are under MIT, its Llama-3.1 text encoder under Meta's licence",
)
