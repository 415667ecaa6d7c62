"""PixArt-alpha and PixArt-sigma: facts of their layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="pixart",
    title="PixArt",
    pipeline_classes=("PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"),
    components=(
        Component("scheduler", "diffusers", ("DPMSolverMultistepScheduler",)),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5Tokenizer", "T5TokenizerFast")),
        Component(
            "transformer",
            "diffusers",
            ("PixArtTransformer2DModel", "Transformer2DModel"),
            original_files=("pixart-xl-2-*.pth", "pixart-sigma-xl-2-*.pth"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    originals=("conversions.pixart.original",),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="weights are under the CreativeML Open RAIL++-M license; a port keeps its source's licence",
)
