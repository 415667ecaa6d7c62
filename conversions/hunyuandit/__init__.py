"""Hunyuan-DiT (1.0 to 1.2): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="hunyuandit",
    title="Hunyuan-DiT",
    pipeline_classes=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPAGPipeline"),
    components=(
        Component("scheduler", "diffusers", ("DDPMScheduler",)),
        Component("text_encoder", "transformers", ("BertModel",)),
        Component("text_encoder_2", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("BertTokenizer", "BertTokenizerFast")),
        Component("tokenizer_2", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("HunyuanDiT2DModel",),
            original_files=("pytorch_model_ema.pt", "pytorch_model_module.pt", "pytorch_model_distill.pt"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    originals=("conversions.hunyuandit.original",),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under the Tencent Hunyuan Community License; a port keeps its source's licence",
)
