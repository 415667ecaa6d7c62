"""AuraFlow (0.1 to 0.3): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    pipeline_classes=("AuraFlowPipeline",),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("UMT5EncoderModel",)),
        Component("tokenizer", "transformers", ("LlamaTokenizerFast", "LlamaTokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("AuraFlowTransformer2DModel",),
            original_files=("aura_diffusion_pytorch_model.bin", "aura_flow_*.safetensors"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    originals=("conversions.auraflow.original",),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under Apache-2.0",
)
