"""FLUX.1 (dev, schnell and models of their shape): original layout, diffusers layout, native model."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    pipeline_classes=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxPriorReduxPipeline",
        "VisualClozePipeline",
        "VisualClozeGenerationPipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("CLIPTextModel",)),
        Component("text_encoder_2", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        Component("tokenizer_2", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("FluxTransformer2DModel",),
            original_files=("flux1-*.safetensors", "flux1*.safetensors", "flux*.safetensors"),
            original_name="flux1.safetensors",
            original_class="Flux",
            recipe="conversions.flux1.recipe:TRANSFORMER",
            native="conversions.flux1.model:FluxTransformer",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKL",),
            original_files=("ae.safetensors", "ae.sft"),
            original_name="ae.safetensors",
            original_class="AutoEncoder",
            recipe="conversions.common.autoencoder_kl.recipe:AUTOENCODER",
        ),
    ),
    pipeline="conversions.flux1.pipelines:EntryClass",
    native_pipelines=("FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline"),
    bench="conversions.flux1.bench:CASES",
    cases="conversions.flux1.case:CASES",
    reference="conversions/flux1/reference",
    reference_code="black-forest-labs/flux at 802fb4713906133fcbd0d8dc5351620ca4773036",
    style="Modular",
    style_reason="standard text-to-image",
    license_hint=(
        "FLUX.1-dev weights are under the FLUX.1 [dev] Non-Commercial License, FLUX.1-schnell under Apache-2.0; a port"
        " keeps its source's licence"
    ),
)
