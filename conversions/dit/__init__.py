"""DiT (class to image): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="dit",
    title="DiT",
    pipeline_classes=("DiTPipeline",),
    components=(
        Component("scheduler", "diffusers", ("DDIMScheduler", "DPMSolverMultistepScheduler")),
        Component(
            "transformer",
            "diffusers",
            ("DiTTransformer2DModel", "Transformer2DModel"),
            original_files=(
                "dit-xl-2-256x256.pt",
                "dit-xl-2-512x512.pt",
                "dit-xl-2-256x256.safetensors",
                "dit-xl-2-512x512.safetensors",
            ),
            original_name="DiT.safetensors",
            original_class="DiT",
            recipe="conversions.dit.recipe:TRANSFORMER",
        ),
        Component("vae", "diffusers", ("AutoencoderKL",)),
    ),
    cases="conversions.dit.case:CASES",
    originals=("conversions.dit.original",),
    reference="conversions/dit/reference",
    reference_code="facebookresearch/DiT at ed81ce2229091fd4ecc9a223645f95cf379d582b",
    style="Modular",
    style_reason="class labels instead of text; the rest is standard",
    license_hint="code and weights are under CC-BY-NC 4.0; a port keeps its source's licence",
)
