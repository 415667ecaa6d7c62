"""What parity must know about Wan beyond the recipes: how each side is called, and what its blocks take.

B: videos, T: text tokens, M: tokens of a video's pictures, Q: 1, or as many as patches have times, D: model width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.common.candidates import diffusers_candidate, load
from conversions.wan.model import WanTransformer
from conversions.wan.recipe import ON_LOAD
from parity.case import Block, Candidate, ComponentCase, Cross, FamilyCases, Named, PipelineCase, PipelineSide, Shapes
from parity.stages import Request
from porter.core.files import read_config
from runtime import registry
from runtime.loader import load_module, quiet_libraries

HERE = Path(__file__).parent
FRAMES, HEIGHT, WIDTH = 5, 128, 192  # of the videos compared; what the models make would take a CPU days
PROMPT = "a large red circle moves from the left to the right, on a white background"


# --- the transformer -------------------------------------------------------------------------------------------------


def _arguments(given: Named) -> dict[str, Tensor]:
    """The original's inputs under diffusers' names: x (1, C, F, H, W), t (1) or (1, patches), context (1, T, text);
    y (1, C', F, H, W), clip_fea (images, n, E)."""
    x = torch.cat([given["x"], given["y"]], 1) if "y" in given else given["x"]
    found = {"hidden_states": x, "timestep": given["t"], "encoder_hidden_states": given["context"]}
    return found | ({"encoder_hidden_states_image": given["clip_fea"]} if "clip_fea" in given else {})


def _table_anew(model: Any) -> None:
    """diffusers keeps the rotary table as it was built, in float32, and the original computes it in float64; so the
    table is built anew in the precision of the run, which in float32 is what diffusers has."""
    rope = model.rope
    table = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    rope.freqs_cos, rope.freqs_sin = table.freqs_cos, table.freqs_sin


def _call_diffusers(model: Any, given: Named) -> Tensor:
    _table_anew(model)
    out: Tensor = model(**given, return_dict=False)[0]
    return out


def _diffusers_forward(model: Any, given: Named) -> Tensor:
    return _call_diffusers(model, _arguments(given))


def _native_forward(model: Any, given: Named) -> Tensor:
    out: Tensor = model(**_arguments(given))
    return out


def _diffusers_in(own: Named, _: Shapes) -> Named:
    return {"x": own["hidden_states"], "e": own["temb"], "context": own["encoder_hidden_states"]}


def _context(own: Named) -> Tensor:
    """The native block's text, behind the pictures' tokens as both others have it: (B, M + T, D)."""
    return torch.cat([own["context.1"], own["context.0"]], 1) if "context.1" in own else own["context.0"]


def _native_in(own: Named, shapes: Shapes) -> Named:
    """The modulation (B, Q, 6, D) has no axis of times where all patches have one."""
    return {"x": own["x"], "e": own["modulation"].reshape(shapes["e"]), "context": _context(own)}


def _native_as_diffusers_in(own: Named, shapes: Shapes) -> Named:
    tables = {f"rotary_emb.{i}": own[f"rope.{i}"].repeat_interleave(2, -1)[None, :, None] for i in range(2)}
    modulation = own["modulation"].reshape(shapes["temb"])
    return {"hidden_states": own["x"], "temb": modulation, "encoder_hidden_states": _context(own), **tables}


def load_native(folder: Path) -> nn.Module:
    """The native transformer of a port, float32, filled strictly by the runtime's own loader."""
    config, cpu = read_config(folder / "config.json"), torch.device("cpu")
    return load_module(WanTransformer, config, folder, dtype=torch.float32, device=cpu)


BLOCKS = r"blocks\.\d+"
PASSES = ("first", "second")
DIFFUSERS = replace(
    diffusers_candidate("WanTransformer3DModel", dict.fromkeys(PASSES, _diffusers_forward)),
    blocks=(Block(BLOCKS, inputs=_diffusers_in),),
)
NATIVE = Candidate(
    name="native",
    load=lambda folder: load_native(folder),
    passes=dict.fromkeys(PASSES, _native_forward),
    blocks=(Block(BLOCKS, force=lambda ref, own: {"x": ref["x"]}, inputs=_native_in),),
    on_load=ON_LOAD,
)
NATIVE_VERSUS_DIFFUSERS = replace(
    NATIVE,
    passes={"forward": lambda model, inputs: model(**inputs)},
    blocks=(Block(BLOCKS, force=lambda ref, own: {"x": ref["hidden_states"]}, inputs=_native_as_diffusers_in),),
)


def transformer_inputs(folder: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs by the port's config: two videos of 3 x 2 x 3 patches; with pictures, diffusers' 512 tokens."""
    config, draw = read_config(folder / "config.json"), torch.Generator().manual_seed(seed)
    sides = [n * p for n, p in zip((3, 2, 3), config["patch_size"], strict=True)]
    pictures = config.get("image_dim") is not None
    given = {
        "hidden_states": torch.randn(2, config["in_channels"], *sides, generator=draw),
        "timestep": torch.tensor([9.375, 2.1]),
        "encoder_hidden_states": torch.randn(2, 512 if pictures else 7, config["text_dim"], generator=draw),
    }
    if pictures:
        places = config.get("pos_embed_seq_len")
        rows = (4, places // 2) if places is not None else (2, 5)
        given["encoder_hidden_states_image"] = torch.randn(*rows, config["image_dim"], generator=draw)
    return {"forward": given}


CROSS = Cross(DIFFUSERS, NATIVE_VERSUS_DIFFUSERS, call=_call_diffusers, inputs=transformer_inputs, whole=BLOCKS)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def _statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, as diffusers' pipelines take them from the config."""
    mean, std = (
        torch.tensor(model.config[key], dtype=like.dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std


def _encode(model: Any, given: Named) -> Tensor:
    """Videos (B, 3, F, H, W) -> the mean of their latents, normalised, which the original does inside `encode`."""
    mean, std = _statistics(model, given["x"])
    latents: Tensor = (model.encode(given["x"]).latent_dist.mode() - mean) / std
    return latents


def _decode(model: Any, given: Named) -> Tensor:
    """Normalised latents (B, C, f, h, w) -> videos."""
    mean, std = _statistics(model, given["z"])
    video: Tensor = model.decode(given["z"] * std + mean, return_dict=False)[0]
    return video


AUTOENCODER = replace(
    diffusers_candidate("AutoencoderKLWan", {"encode": _encode, "decode": _decode}),
    blocks=(Block(r".+"),),  # a convolution also takes cached frames; both sides call everything alike
)


# --- the pipeline ----------------------------------------------------------------------------------------------------


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers.WanPipeline of a port on the CPU. Its transformers are filled here: without accelerate diffusers does
    not load classes that keep parts in float32."""
    with quiet_libraries():
        from diffusers import WanPipeline

        names = [n for n in ("transformer", "transformer_2") if (port / n).is_dir()]
        transformers = {name: _as_diffusers_casts(load("diffusers", "WanTransformer3DModel", port / name), dtype)
                        for name in names}  # fmt: skip
        pipe: Any = WanPipeline.from_pretrained(
            port, **transformers, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)

    def run(request: Request) -> Tensor:
        for transformer in transformers.values():
            _table_anew(transformer)
        video: Tensor = pipe(
            request.prompts,
            generator=[torch.Generator().manual_seed(request.seed + i) for i in range(len(request.prompts))],
            output_type="pt",
            **_asked(request, pipe.vae_scale_factor_spatial * 2),
        ).frames
        return video

    return _side(pipe.components, run)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port on the CPU."""
    # Exact, as otherwise a model with a time for each patch is given one for all, where that is the same.
    pipe = registry.load(port, dtype=dtype, device="cpu", executor="native", quality="exact")

    def run(request: Request) -> Tensor:
        asked = _asked(request, pipe.config.size_multiple())
        scale = asked["guidance_scale"] if "transformer_2" in pipe.modules else None  # of both, as diffusers has it
        answer = pipe.generate(request.prompts, seed=request.seed, guidance_scale_2=scale, **asked)
        assert answer.output is not None  # the last stage verified it
        return answer.output.transpose(1, 2)  # (B, F, 3, H, W)

    return _side(pipe.modules, run)


def _as_diffusers_casts(module: Any, dtype: torch.dtype) -> nn.Module:
    """In half precision some parts stay float32, as from_pretrained leaves them."""
    kept = set(module._keep_in_fp32_modules) if dtype in (torch.float16, torch.bfloat16) else set()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    changed: nn.Module = module
    return changed


def _asked(request: Request, multiple: int) -> dict[str, Any]:
    """What both sides are asked for, in words that both have."""
    height, width = (
        max(multiple, int(part * side) // multiple * multiple)
        for part, side in zip(request.part, (HEIGHT, WIDTH), strict=True)
    )
    negative, scale = request.negative or ("", request.guidance)
    return {
        "negative_prompt": [negative] * len(request.prompts), "guidance_scale": scale, "height": height, "width": width,
        "num_frames": FRAMES, "num_inference_steps": request.steps,
    }  # fmt: skip


def _side(parts: Any, run: Any) -> PipelineSide:
    denoisers = {name.replace("transformer", "denoiser"): parts[name]
                 for name in ("transformer", "transformer_2") if parts.get(name) is not None}  # fmt: skip
    text, vae = parts["text_encoder"], parts["vae"]
    stages = {"text_encoder": text, **denoisers, "decoder": vae.decoder}
    return PipelineSide(stages, (text, *denoisers.values(), vae), parts["scheduler"], run)


# UniPC solves for its weights with numbers of two types where float64 is torch's default, which fails: the baseline
# decides for models that come with it. Both sides do the same arithmetic, so it is small.
PIPELINE = PipelineCase(
    diffusers_pipeline, native_pipeline, PROMPT, 4, 5.0,
    own=("rotary", "cache"), baseline=1e-6, negative=("a green triangle", 2.5),
)  # fmt: skip


def _case(component: str, variant: str) -> ComponentCase:
    trace = HERE / "reference" / f"{component}-{variant}.safetensors"
    if component == "vae":
        return ComponentCase(component, "conversions.wan.vae_recipe:AUTOENCODER", trace, (AUTOENCODER,))
    return ComponentCase(component, "conversions.wan.recipe:TRANSFORMER", trace, (NATIVE, DIFFUSERS), (CROSS,))


CASES = FamilyCases(
    components=(
        *(_case("transformer", name) for name in ("2.1-t2v", "2.1-i2v", "2.1-flf2v", "2.2-ti2v")),
        *(_case("vae", name) for name in ("2.1", "2.2")),
    ),
    pipelines={"WanPipeline": PIPELINE},
    code=("conversions.wan", "conversions.common", "runtime", "porter.core"),
)
