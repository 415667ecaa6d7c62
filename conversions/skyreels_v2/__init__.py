"""SkyReels-V2 (Wan 2.1's architecture, diffusion forcing): facts that Wan's do not cover."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="skyreels_v2",
    title="SkyReels-V2",
    pipeline_classes=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    components=(
        Component("image_encoder", "transformers", ("CLIPVisionModelWithProjection", "CLIPVisionModel")),
        Component("image_processor", "transformers", ("CLIPProcessor", "CLIPImageProcessor")),
        Component("scheduler", "diffusers", ("UniPCMultistepScheduler",)),
        Component("text_encoder", "transformers", ("UMT5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component("transformer", "diffusers", ("SkyReelsV2Transformer3DModel",)),
        Component("vae", "diffusers", ("AutoencoderKLWan",)),
    ),
    originals=("conversions.skyreels_v2.original",),
    style="Hybrid",
    style_reason="diffusion forcing: every frame has its own timestep, and long videos are made chunk after chunk",
    license_hint="the weights are under a licence of Skywork's own; a port keeps its source's licence",
)
