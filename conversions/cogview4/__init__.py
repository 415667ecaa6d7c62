"""CogView4 (6B, 6B Control): facts of its layouts."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="cogview4",
    title="CogView4",
    pipeline_classes=("CogView4Pipeline", "CogView4ControlPipeline"),
    components=(
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("GlmModel",)),
        Component("tokenizer", "transformers", ("PreTrainedTokenizerFast",)),
        Component(
            "transformer",
            "diffusers",
            ("CogView4Transformer2DModel",),
            original_files=("mp_rank_00_model_states.pt", "model_optim_rng.pt"),
        ),
        Component("vae", "diffusers", ("AutoencoderKL",), original_files=("imagekl_ch16.pt",)),
    ),
    style="Modular",
    style_reason="standard text-to-image",
    license_hint="CogView4-6B weights are under Apache-2.0",
)
