"""What parity must know about Stable Diffusion 3 beyond the recipe: how each side is called and names its activations.

B: images, T: text tokens, S: image tokens, D: model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.common.autoencoder_kl.case import autoencoder_case
from conversions.common.candidates import diffusers_candidate, heads_and_tokens
from conversions.common.pipelines import OneAfterTheOther, levels, saved_by_diffusers, size_of
from conversions.sd3.model import SD3Transformer
from conversions.sd3.recipe import ON_LOAD
from parity.case import Block, Candidate, ComponentCase, Cross, FamilyCases, Named, PipelineCase, PipelineSide, Shapes
from parity.stages import Request
from porter.core.files import read_config
from runtime.image import to_pil
from runtime.loader import load_module, quiet_libraries
from runtime.registry import load
from runtime.request import Req

HERE = Path(__file__).parent
PROMPT = "a large red circle left of a small blue square, on a white background"
NEGATIVE = "a green triangle", 2.5
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LENGTH = 256  # tokens of T5, where its tokenizer has as many


# --- the transformer -------------------------------------------------------------------------------------------------


def _arguments(given: Named) -> dict[str, Tensor]:
    """x (B, C, H, W), t (B), y (B, pooled), context (B, T, joint), under diffusers' names."""
    return {
        "hidden_states": given["x"], "timestep": given["t"], "pooled_projections": given["y"],
        "encoder_hidden_states": given["context"],
    }  # fmt: skip


def load_native(folder: Path) -> nn.Module:
    """The native transformer of a port, float32, filled strictly by the runtime's own loader."""
    config = read_config(folder / "config.json")
    return load_module(SD3Transformer, config, folder, dtype=torch.float32, device=torch.device("cpu"))


DIFFUSERS = diffusers_candidate(
    "SD3Transformer2DModel",
    {"forward": lambda model, given: model(**_arguments(given), return_dict=False)[0]},
    heads_and_tokens(r"\.ln_[qk]"),
)

NATIVE = Candidate(
    name="native",
    load=load_native,
    passes={"forward": lambda model, given: model(**_arguments(given))},
    on_load=ON_LOAD,
)


def _block_in(own: Named, _: Shapes) -> Named:
    return {"hidden_states": own["img"], "encoder_hidden_states": own["txt"], "temb": own["vec"]}


def _block_out(own: Named, _: Shapes) -> Named:
    """diffusers answers text first; the last block has none."""
    return {"1": own["0"]} | ({"0": own["1"]} if "1" in own else {})


NATIVE_VERSUS_DIFFUSERS = Candidate(
    name="native",
    load=load_native,
    passes={"forward": lambda model, given: model(**given)},
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            force=lambda ref, own: {"img": ref["hidden_states"], "txt": ref["encoder_hidden_states"]},
            inputs=_block_in,
            outputs=_block_out,
        ),
        Block(
            "pos_embed",  # owns the learned positions, and crops them; ours are cropped ahead
            force=lambda ref, own: {"latents": ref["latent"]},
            inputs=lambda own, _: {"latent": own["latents"]},
        ),
    ),
    layout=heads_and_tokens(r"\.norm_(added_)?[qk]"),
    on_load=ON_LOAD,
)


def transformer_inputs(folder: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs by the port's config: two images of 4 x 3 patches, 7 text tokens."""
    config = read_config(folder / "config.json")
    draw, patch = torch.Generator().manual_seed(seed), config["patch_size"]
    return {
        "forward": {
            "hidden_states": torch.randn(2, config["in_channels"], 4 * patch, 3 * patch, generator=draw),
            "encoder_hidden_states": torch.randn(2, 7, config["joint_attention_dim"], generator=draw),
            "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=draw),
            "timestep": torch.tensor([937.5, 210.0]),
        }
    }


CROSS = Cross(
    DIFFUSERS,
    NATIVE_VERSUS_DIFFUSERS,
    call=lambda model, given: model(**given, return_dict=False)[0],
    inputs=transformer_inputs,
    whole=r"transformer_blocks\.\d+|pos_embed",
)


# --- the pipeline ----------------------------------------------------------------------------------------------------


def _guidance(request: Request) -> tuple[str | None, float]:
    """The negative prompt, and the scale."""
    return request.negative or (None, request.guidance)


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers.StableDiffusion3Pipeline of a port on the CPU."""
    without = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (port / name).exists()}
    with quiet_libraries():
        from diffusers import StableDiffusion3Pipeline

        pipe: Any = StableDiffusion3Pipeline.from_pretrained(
            port, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True, **without
        ).to(dtype)  # diffusers leaves a float32 file's transformer in float32 where it loads without accelerate
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    pipe.transformer = halves = OneAfterTheOther(transformer)

    def run(request: Request) -> Tensor:
        factor = pipe.vae_scale_factor
        height, width = size_of(request, pipe.default_sample_size * factor, pipe.patch_size * factor)
        negative, scale = _guidance(request)
        halves.guided = scale > 1
        image: Tensor = pipe(
            request.prompts,
            negative_prompt=None if negative is None else [negative] * len(request.prompts),
            height=height,
            width=width,
            num_inference_steps=request.steps,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(request.seed + i) for i in range(len(request.prompts))],
            max_sequence_length=LENGTH if without else min(LENGTH, pipe.tokenizer_3.model_max_length),
            output_type="pt",
        ).images
        return image

    parts = {name: getattr(pipe, name) for name in TEXT_ENCODERS if name not in without}
    return _side(parts, transformer, pipe.vae, pipe.scheduler, run=run, save=saved_by_diffusers)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port on the CPU."""
    pipe = load(port, dtype=dtype, device="cpu")

    def run(request: Request) -> Tensor:
        height, width = size_of(request, pipe.config.default_size(Req())[0], pipe.config.size_multiple())
        negative, scale = _guidance(request)
        answer = pipe.generate(
            request.prompts, negative_prompt=negative, guidance_scale=scale, height=height, width=width,
            seed=request.seed, num_inference_steps=request.steps, max_sequence_length=LENGTH,
        )  # fmt: skip
        assert answer.output is not None  # the last stage verified it
        return answer.output

    get = pipe.modules
    parts = {name: get[name] for name in TEXT_ENCODERS if name in get}
    save = lambda image: levels(to_pil(image))  # noqa: E731
    return _side(parts, get["transformer"], get["vae"], get["scheduler"], run=run, save=save)


def _side(
    encoders: dict[str, nn.Module], transformer: nn.Module, vae: Any, scheduler: Any, *, run: Any, save: Any
) -> PipelineSide:
    stages = {**encoders, "denoiser": transformer, "decoder": vae.decoder}
    return PipelineSide(stages, (*encoders.values(), transformer, vae), scheduler, run, save)


CASES = FamilyCases(
    components=(
        *(
            ComponentCase(
                "transformer", "conversions.sd3.recipe:TRANSFORMER",
                HERE / "reference" / f"transformer-{variant}.safetensors", (NATIVE, DIFFUSERS), cross=(CROSS,),
            )
            for variant in ("medium", "3.5-medium", "3.5-large")
        ),
        autoencoder_case(HERE / "reference" / "vae.safetensors"),
    ),
    pipelines={
        "StableDiffusion3Pipeline": PipelineCase(
            diffusers_pipeline, native_pipeline, PROMPT, 8, 4.5, own=("positions",), negative=NEGATIVE,
        ),
    },
    code=("conversions.sd3", "conversions.common", "runtime", "porter.core"),
)  # fmt: skip
