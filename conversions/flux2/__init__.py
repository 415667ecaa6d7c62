"""FLUX.2 (dev, klein): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    pipeline_classes=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Mistral3ForConditionalGeneration", "Qwen3ForCausalLM")),
        Component("tokenizer", "transformers", ("PixtralProcessor", "Qwen2TokenizerFast", "Qwen2Tokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("Flux2Transformer2DModel",),
            original_files=("flux2-dev*.safetensors", "flux-2-klein-*.safetensors"),
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLFlux2",),
            original_files=("ae.safetensors", "flux2-vae.*", "full_encoder_small_decoder.safetensors"),
        ),
    ),
    originals=("conversions.flux2.original",),
    style="Modular",
    style_reason="standard text-to-image; reference images are more tokens of the same sequence",
    license_hint=(
        "FLUX.2-dev and klein 9B weights are under a FLUX non-commercial licence, klein 4B under Apache-2.0; a port"
        " keeps its source's licence"
    ),
)
