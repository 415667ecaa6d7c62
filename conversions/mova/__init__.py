"""MOVA (video with sound from text and image): facts of the layout in which it was released."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="mova",
    title="MOVA",
    pipeline_classes=("MOVA",),
    components=(
        Component("audio_dit", "mova", ("WanAudioModel",)),
        Component("audio_vae", "mova", ("DAC",)),
        Component("dual_tower_bridge", "mova", ("DualTowerConditionalBridge",)),
        Component("scheduler", "mova", ("FlowMatchPairScheduler",)),
        Component("text_encoder", "transformers", ("UMT5EncoderModel",)),
        Component("tokenizer", "transformers", ("T5TokenizerFast", "T5Tokenizer")),
        Component("video_dit", "mova", ("WanModel",)),
        Component("video_dit_2", "mova", ("WanModel",)),
        Component("video_vae", "diffusers", ("AutoencoderKLWan",)),
    ),
    style="Hybrid",
    style_reason="two towers, for video and for sound, are denoised together over a bridge",
    originals=("conversions.mova.original",),
    license_hint="the code is under Apache-2.0; a port keeps its source's licence",
)
