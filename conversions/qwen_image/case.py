"""What parity must know about Qwen-Image beyond the recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from conversions.common.candidates import diffusers_candidate, heads_and_tokens
from conversions.qwen_image.model import QwenImageTransformer
from conversions.qwen_image.recipe import ON_LOAD
from parity.case import Block, Candidate, ComponentCase, Cross, FamilyCases, Named, PipelineCase, PipelineSide, Shapes
from parity.stages import Request
from porter.core.files import read_config
from runtime.image import to_pil
from runtime.loader import library_class, load_module, quiet_libraries, read_index, without_videos
from runtime.registry import load as load_port

HERE = Path(__file__).parent
PROMPT = "a large red circle left of a small blue square, on a white background"


# --- the transformer -------------------------------------------------------------------------------------------------


def _arguments(given: Named) -> dict[str, Any]:
    """Latents (1, C, H, W) in patches of 2 x 2, t (1), text (1, T, E) without padding."""
    latents = given["latents"]
    height, width = (size // 2 for size in latents.shape[-2:])
    patches = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)  # (1, H, W, C, 2, 2)
    return {
        "hidden_states": patches.flatten(3).flatten(1, 2), "encoder_hidden_states": given["text"],
        "timestep": given["t"], "img_shapes": [(1, height, width)],
    }  # fmt: skip


def _diffusers(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Its shapes are a list for each image."""
    shapes = [given["img_shapes"]] * len(given["timestep"])
    out: Tensor = model(**{**given, "img_shapes": shapes}, return_dict=False)[0]
    return out


def _forward(model: Any, given: Named) -> Tensor:
    return _diffusers(model, _arguments(given))


def _native(model: Any, given: Named) -> Tensor:
    out: Tensor = model(**_arguments(given))
    return out


def load_native(folder: Path) -> nn.Module:
    """The native transformer of a port, float32, filled strictly by the runtime's own loader."""
    config = read_config(folder / "config.json")
    return load_module(QwenImageTransformer, config, folder, dtype=torch.float32, device=torch.device("cpu"))


HEADS = heads_and_tokens(r"\.norm_(added_)?[qk]")
TRANSFORMER = diffusers_candidate("QwenImageTransformer2DModel", {"first": _forward, "second": _forward}, HEADS)
NATIVE = Candidate("native", load_native, {"first": _native, "second": _native}, layout=HEADS, on_load=ON_LOAD)


def _shapes(given: Named) -> dict[str, Any]:
    """The tensor of shapes as both classes take it."""
    return {**given, "img_shapes": [tuple(shape) for shape in given["img_shapes"].tolist()]}


def _text(shapes: Shapes) -> int:
    return shapes["encoder_hidden_states"][1]


def _native_in(own: Named, shapes: Shapes) -> Named:
    """Its table is the joint sequence's, text first, in real numbers; its mask is the joint one."""
    turns = torch.complex(own["rope.0"], own["rope.1"])
    text = _text(shapes)
    given = {"hidden_states": own["img"], "encoder_hidden_states": own["txt"], "temb": own["vec"]}
    given |= {"image_rotary_emb.0": turns[text:], "image_rotary_emb.1": turns[:text]}
    if "mask" in own:
        given["encoder_hidden_states_mask"] = own["mask"][:, :text]
    if "clean" in own:
        given["modulate_index"] = own["clean"].int().expand(own["img"].shape[0], -1)
    return given


NATIVE_VERSUS_DIFFUSERS = Candidate(
    name="native",
    load=load_native,
    passes={name: lambda model, inputs: model(**_shapes(inputs)) for name in ("picture", "pictures")},
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            force=lambda ref, own: {"img": ref["hidden_states"], "txt": ref["encoder_hidden_states"]},
            inputs=_native_in,
            outputs=lambda own, _: {"0": own["1"], "1": own["0"]},  # diffusers answers text first
        ),
    ),
    on_load=ON_LOAD,
)


def transformer_inputs(folder: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs by the port's config: two images with prompts of 7 and 4 tokens, one and three pictures each."""
    config, draw = read_config(folder / "config.json"), torch.Generator().manual_seed(seed)
    passes = {}
    for name, pictures in (("picture", [[1, 3, 5]]), ("pictures", [[1, 4, 3], [1, 3, 2], [1, 2, 2]])):
        shapes = torch.tensor(pictures)
        passes[name] = {
            "hidden_states": torch.randn(2, int(shapes.prod(1).sum()), config["in_channels"], generator=draw),
            "encoder_hidden_states": torch.randn(2, 7, config["joint_attention_dim"], generator=draw),
            "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [4]]),
            "timestep": torch.rand(2, generator=draw),
            "img_shapes": shapes,
        }
        if config.get("use_additional_t_cond"):
            passes[name]["additional_t_cond"] = torch.tensor([0, 1])
    return passes


CROSS = Cross(
    TRANSFORMER, NATIVE_VERSUS_DIFFUSERS, call=lambda model, inputs: _diffusers(model, _shapes(inputs)),
    inputs=transformer_inputs, whole=r"transformer_blocks\.\d+",
)  # fmt: skip


# --- the autoencoder -------------------------------------------------------------------------------------------------


def _statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, as diffusers' pipelines take them from the config."""
    mean, std = (
        torch.tensor(model.config[key], dtype=like.dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std


def _encode(model: Any, given: Named) -> Tensor:
    """Videos (B, C, F, H, W) -> the mean of their latents, normalised, which the original does inside `encode`."""
    mean, std = _statistics(model, given["x"])
    latents: Tensor = (model.encode(given["x"]).latent_dist.mode() - mean) / std
    return latents


def _decode(model: Any, given: Named) -> Tensor:
    """Normalised latents (B, C, f, h, w) -> videos."""
    mean, std = _statistics(model, given["z"])
    video: Tensor = model.decode(given["z"] * std + mean, return_dict=False)[0]
    return video


AUTOENCODER = replace(
    diffusers_candidate("AutoencoderKLQwenImage", {"encode": _encode, "decode": _decode}),
    blocks=(Block(r".+"),),  # a convolution also takes cached frames; both sides call everything alike
)

# --- the pipelines ---------------------------------------------------------------------------------------------------


def diffusers_port(port: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a port on the CPU.

    Its language model gets the processor's `mm_token_type_ids` as ours does: diffusers leaves them out
    (https://github.com/huggingface/diffusers/issues/14194), and the tokens of pictures would stand in a row like text.
    """
    index, given = read_index(port), {}
    with quiet_libraries():
        import diffusers

        if "processor" in index:
            cls = without_videos(library_class(*index["processor"]))
            given["processor"] = processor = cls.from_pretrained(port / "processor")
        pipeline: Any = getattr(diffusers, index["_class_name"])
        pipe = pipeline.from_pretrained(port, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True, **given)
    pipe.set_progress_bar_config(disable=True)

    def tell_pictures(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kinds = processor.create_mm_token_type_ids(kwargs["input_ids"].tolist())
        return args, kwargs | {"mm_token_type_ids": torch.tensor(kinds)}

    if given:
        pipe.text_encoder.register_forward_pre_hook(tell_pictures, with_kwargs=True)
    return pipe


def _picture() -> Image.Image:
    """A picture to edit: colours that change along both sides, and a dark disc."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    disc = ((rows - 0.4) ** 2 + (columns - 0.6) ** 2 < 0.04).float()
    (picture,) = to_pil(torch.stack([rows, columns, 1 - rows])[None] * (1 - 0.8 * disc))
    return picture


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers' pipeline of a port as a side of the comparison."""
    from diffusers.image_processor import VaeImageProcessor

    pipe = diffusers_port(port, dtype)

    def paint(request: Request, seed: int, prompts: list[str], given: dict[str, Any]) -> Tensor:
        negative, scale = request.negative or (None, 1.0)
        height, width = _size(request, 2 * pipe.vae_scale_factor)
        image: Tensor = pipe(
            prompt=prompts, negative_prompt=[negative] * len(prompts) if negative else None, true_cfg_scale=scale,
            height=height, width=width, num_inference_steps=request.steps, output_type="pt", **given,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        ).images  # fmt: skip
        return image

    def save(image: Tensor) -> Tensor:
        return _levels(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image)))

    given = {"image": _picture()} if hasattr(pipe, "processor") else {}
    return _side(pipe.text_encoder, pipe.transformer, pipe.vae, pipe.scheduler, paint, given, save)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port as a side of the comparison."""
    pipe = load_port(port, dtype=dtype, device="cpu", executor="native")

    def paint(request: Request, seed: int, prompts: list[str], given: dict[str, Any]) -> Tensor:
        negative, scale = request.negative or (None, 1.0)
        height, width = _size(request, pipe.config.size_multiple())
        answer = pipe.generate(
            prompts, negative_prompt=negative, true_cfg_scale=scale, height=height, width=width, seed=seed,
            num_inference_steps=request.steps, **given,
        )  # fmt: skip
        assert answer.output is not None  # the last stage verified it
        return answer.output

    given = {"image": [_picture()]} if "processor" in pipe.modules else {}
    encoder, transformer, vae, scheduler = (
        pipe.modules[name] for name in ("text_encoder", "transformer", "vae", "scheduler")
    )
    return _side(encoder, transformer, vae, scheduler, paint, given, lambda image: _levels(to_pil(image)))


def _size(request: Request, multiple: int) -> tuple[int, int]:
    """Eight tokens a side, or a part of them: what is wrong is wrong in small pictures too."""
    height, width = (max(1, round(8 * part)) * multiple for part in request.part)
    return height, width


def _levels(pictures: list[Any]) -> Tensor:
    """PIL pictures -> uint8 (B, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def _side(
    encoder: Any, transformer: nn.Module, vae: Any, scheduler: Any, paint: Callable[..., Tensor], given: dict[str, Any],
    save: Callable[[Tensor], Tensor],
) -> PipelineSide:  # fmt: skip
    """`paint`: (request, seed, prompts, given) -> pictures. Editing does one prompt at a time, as diffusers does."""

    def run(request: Request) -> Tensor:
        if not given:
            return paint(request, request.seed, request.prompts, given)
        return torch.cat([paint(request, request.seed + i, [text], given) for i, text in enumerate(request.prompts)])

    stages = {"text_encoder": encoder.model, "denoiser": transformer, "decoder": vae.decoder}
    return PipelineSide(stages, (encoder, transformer, vae), scheduler, run, save)


PIPELINE = PipelineCase(
    diffusers_pipeline, native_pipeline, PROMPT, 8, 0.0, own=("rotary",), negative=("a green triangle", 2.5)
)
CASES = FamilyCases(
    components=(
        ComponentCase(
            "transformer", "conversions.qwen_image.recipe:TRANSFORMER", HERE / "reference" / "transformer.safetensors",
            (NATIVE, TRANSFORMER), (CROSS,),
        ),
        ComponentCase(
            "vae", "conversions.qwen_image.vae_recipe:AUTOENCODER", HERE / "reference" / "vae.safetensors",
            (AUTOENCODER,),
        ),
    ),
    pipelines=dict.fromkeys(("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"), PIPELINE),
    code=("conversions.qwen_image", "conversions.common", "runtime", "porter.core"),
)  # fmt: skip
