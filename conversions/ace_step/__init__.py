"""ACE-Step 1.5 (music from text and lyrics): facts of the diffusers layout and, derived, of the release."""

from porter.core.family import Component, Family

FAMILY = Family(
    name="ace_step",
    title="ACE-Step 1.5",
    pipeline_classes=("AceStepPipeline",),
    components=(
        Component("audio_token_detokenizer", "ace_step", ("AceStepAudioTokenDetokenizer",)),
        Component("audio_tokenizer", "ace_step", ("AceStepAudioTokenizer",)),
        Component("condition_encoder", "ace_step", ("AceStepConditionEncoder",)),
        Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        Component("text_encoder", "transformers", ("Qwen3Model",)),
        Component("tokenizer", "transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        Component("transformer", "diffusers", ("AceStepTransformer1DModel",)),
        Component("vae", "diffusers", ("AutoencoderOobleck",)),
    ),
    style="Hybrid",
    style_reason="lyrics, timbre and optional audio tokens are encoded together before denoising",
    originals=("conversions.ace_step.original",),
    license_hint="the code is under the MIT licence; a port keeps its source's licence",
)
