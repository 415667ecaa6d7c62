"""CogVideoX (2B, 5B, 1.5): facts of the SAT and the diffusers layout."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="cogvideox",
    title="CogVideoX",
    pipeline_classes=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    components=(
        Component("scheduler", "diffusers", ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
        Component("text_encoder", "transformers", ("T5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5Tokenizer",)),
        Component(
            "transformer",
            "diffusers",
            ("CogVideoXTransformer3DModel",),
            original_files=("mp_rank_00_model_states.pt",),
        ),
        Component("vae", "diffusers", ("AutoencoderKLCogVideoX",), original_files=("3d-vae.pt",)),
    ),
    style="Modular",
    style_reason="standard text-to-video and text+image-to-video",
    originals=("conversions.cogvideox.original",),
    license_hint=(
        "CogVideoX-2B is under Apache-2.0, the 5B models under the CogVideoX License; a port keeps its source's licence"
    ),
)
