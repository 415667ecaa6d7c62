"""Wan 2.1 and 2.2 (text, image, frames, VACE, Animate, S2V to video): facts of both layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="wan",
    title="Wan 2.1 / 2.2",
    pipeline_classes=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
        "WanAnimatePipeline",
        "LucyEditPipeline",
    ),
    components=(
        Component(
            "image_encoder",
            "transformers",
            ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
            original_files=("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
        ),
        Component("image_processor", "transformers", ("CLIPImageProcessor", "CLIPProcessor")),
        Component("scheduler", "diffusers", ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
        Component(
            "text_encoder",
            "transformers",
            ("UMT5EncoderModel",),
            original_files=("models_t5_umt5-xxl-enc-bf16.pth",),
        ),
        Component("tokenizer", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component(
            "transformer",
            "diffusers",
            ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
            original_files=(
                "wan2*_t2v_*.safetensors",
                "wan2*_i2v_*.safetensors",
                "wan2*_flf2v_*.safetensors",
                "wan2*_ti2v_*.safetensors",
            ),
            original_name="diffusion_pytorch_model.safetensors",
            original_class="WanModel",
            recipe="conversions.wan.recipe:TRANSFORMER",
            native="conversions.wan.model:WanTransformer",
        ),
        Component(
            "transformer_2",
            "diffusers",
            ("WanTransformer3DModel", "WanVACETransformer3DModel"),
            native="conversions.wan.model:WanTransformer",
        ),
        Component(
            "vae",
            "diffusers",
            ("AutoencoderKLWan",),
            original_files=("wan2.1_vae.pth", "wan2.2_vae.pth", "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"),
            original_name="wan_vae.safetensors",
            original_class="WanVAE_",
            recipe="conversions.wan.vae_recipe:AUTOENCODER",
        ),
    ),
    pipeline="conversions.wan.pipelines:EntryClass",
    native_pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    bench="conversions.wan.bench:CASES",
    cases="conversions.wan.case:CASES",
    reference="conversions/wan/reference",
    reference_code=(
        "Wan-Video/Wan2.1 at 9737cba9c1c3c4d04b33fcad41c111989865d315, Wan-Video/Wan2.2 at"
        " 42bf4cfaa384bc21833865abc2f9e6c0e67233dc"
    ),
    style="Modular",
    style_reason="standard text-to-video and text+image-to-video",
    license_hint="Wan 2.1 and 2.2 are under Apache-2.0; a port keeps its source's licence",
)
