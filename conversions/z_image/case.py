"""What parity must know about Z-Image beyond the recipe.

The original and diffusers take lists of images and captions, and put the image first in the joint sequence; the native
model takes a batch, and puts the text first.

B: images, T: text tokens, filled, S: image tokens, filled, L = S + T, D: model width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from conversions.common.candidates import diffusers_candidate
from conversions.z_image.model import ZImageTransformer
from conversions.z_image.places import filled
from conversions.z_image.recipe import ON_LOAD
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
RECIPE = "conversions.z_image.recipe:TRANSFORMER"


# --- the transformer -------------------------------------------------------------------------------------------------


def _forward(model: Any, given: Named) -> tuple[Tensor, ...]:
    """Lists of pictures (C, F, H, W) and of captions (T, E); t (B)."""
    pictures, captions = ([given[f"{name}{i}"] for i in range(2)] for name in ("x", "caption"))
    return tuple(model(pictures, given["t"], captions, return_dict=False)[0])


DIFFUSERS = diffusers_candidate("ZImageTransformer2DModel", {"forward": _forward})


def _own(given: Named) -> Tensor:
    """bool (B, T), True for a caption's tokens: all of them, where a single prompt's run was captured."""
    everything = torch.ones(given["encoder_hidden_states"].shape[:2])
    return given.get("encoder_attention_mask", everything).bool()


def _lists(model: Any, given: Named) -> Tensor:
    """The native model's inputs as diffusers' lists; its answers as a batch."""
    captions = [row[own] for row, own in zip(given["encoder_hidden_states"], _own(given), strict=True)]
    pictures = list(given["hidden_states"].unsqueeze(2))
    return torch.stack(model(pictures, given["timestep"], captions, return_dict=False)[0]).squeeze(2)


class _Native:
    """Calls of the native model; remembers where its text ends, for the layouts of what it computed."""

    text = 0

    def batch(self, model: Any, given: Named) -> Tensor:
        """Inputs under the model's own names."""
        own = _own(given)
        self.text = filled(int(own.sum(1).max()))
        answer: Tensor = model(**{**given, "encoder_attention_mask": own})
        return answer

    def lists(self, model: Any, given: Named) -> tuple[Tensor, ...]:
        """The original's inputs as a batch; the answers as its list, each with one frame."""
        captions = [given["caption0"], given["caption1"]]
        masks = [torch.ones(len(caption)) for caption in captions]
        answer = self.batch(model, {
            "hidden_states": torch.cat((given["x0"], given["x1"]), dim=1).transpose(0, 1),
            "timestep": given["t"],
            "encoder_hidden_states": pad_sequence(captions, batch_first=True),
            "encoder_attention_mask": pad_sequence(masks, batch_first=True),
        })  # fmt: skip
        return tuple(answer.unsqueeze(2))

    def layout(self, path: str, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
        """(B, L, …) of the main layers and the last one, with the image first; what is embedded, as (B * T, D)."""
        joint = path.startswith(("layers.", "all_final_layer.")) and tensor.ndim > 2
        embedded = path.startswith(("all_x_embedder.", "cap_embedder.")) and tensor.ndim == 3
        return tensor.roll(-self.text, dims=1) if joint else tensor.flatten(0, 1) if embedded else tensor

    def force(self, ref: Named, own: Named) -> Named:
        return {"x": ref["x"].roll(self.text, dims=1)}

    def inputs(self, own: Named, _: Shapes) -> Named:
        return {"x": own["x"].roll(-self.text, dims=1), "adaln_input": own["vec"]}

    def outputs(self, own: Named, _: Shapes) -> Named:
        return {"0": own["0"].roll(-self.text, dims=1)}


def _whole_in(own: Named, shapes: Shapes) -> Named:
    """The batch as diffusers' lists."""
    found = {"t": own["timestep"]}
    for i, picture in enumerate(own["hidden_states"]):
        length = shapes[f"cap_feats.{i}"][0]
        found |= {f"x.{i}": picture.unsqueeze(1), f"cap_feats.{i}": own["encoder_hidden_states"][i, :length]}
    return found


_NATIVE = _Native()
_WHOLE = Block(
    "",  # it has tensors of its own, the learned filling
    force=lambda ref, own: {},
    inputs=_whole_in,
    outputs=lambda own, _: {f"0.{i}": picture.unsqueeze(1) for i, picture in enumerate(own["0"])},
)
_BLOCKS = (
    Block(r"layers\.\d+", force=_NATIVE.force, inputs=_NATIVE.inputs, outputs=_NATIVE.outputs),
    Block(
        r"noise_refiner\.\d+",
        force=lambda ref, own: {"x": ref["x"]},
        inputs=lambda own, _: {"x": own["x"], "adaln_input": own["vec"]},
    ),
    Block(
        r"context_refiner\.\d+", force=lambda ref, own: {"x": ref["x"]}, inputs=lambda own, _: {"x": own["x"]}
    ),
)  # fmt: skip


def _load(cls: type[nn.Module], folder: Path) -> nn.Module:
    """`cls` by its config in `folder`, filled strictly by the runtime's own loader, float32."""
    config = read_config(folder / "config.json")
    return load_module(cls, config, folder, dtype=torch.float32, device=torch.device("cpu"))


NATIVE, NATIVE_VERSUS_DIFFUSERS = (
    Candidate(
        name="native",
        load=partial(_load, ZImageTransformer),
        passes={"forward": call},
        blocks=blocks,
        layout=_NATIVE.layout,
        on_load=ON_LOAD,
    )
    for call, blocks in ((_NATIVE.lists, _BLOCKS), (_NATIVE.batch, (_WHOLE, *_BLOCKS)))
)


def transformer_inputs(folder: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs by the port's config: two images of 4 x 5 patches, captions of 35 and 50 tokens."""
    config = read_config(folder / "config.json")
    draw = torch.Generator().manual_seed(seed)
    return {
        "forward": {
            "hidden_states": torch.randn(2, config["in_channels"], 8, 10, generator=draw),
            "timestep": torch.rand(2, generator=draw),
            "encoder_hidden_states": torch.randn(2, 50, config["cap_feat_dim"], generator=draw),
            "encoder_attention_mask": (torch.arange(50) < torch.tensor([[35], [50]])).float(),
        }
    }


# --- the pipeline ----------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """What one side's denoiser got and answered, as one batch: hooks of the comparison see this module's calls."""

    answer: Tensor

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, T, X) -> (B, C, H, W)."""
        return self.answer


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers.ZImagePipeline of a port on the CPU."""
    with quiet_libraries():
        from diffusers import ZImagePipeline
        from diffusers.image_processor import VaeImageProcessor

        pipe: Any = ZImagePipeline.from_pretrained(port, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    seen = Seen()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """One call with lists of prompts and negative prompts, as one batch of each."""
        pictures, time, captions = args
        parts = 2 if pipe.do_classifier_free_guidance else 1
        size = len(pictures) // parts
        for i in range(0, len(pictures), size):
            seen.answer = torch.stack(out[0][i : i + size]).squeeze(2)
            tokens = pad_sequence(captions[i : i + size], batch_first=True)
            seen(torch.stack(pictures[i : i + size]).squeeze(2), time[i : i + size], tokens)

    pipe.transformer.register_forward_hook(look, with_kwargs=True)

    def run(request: Request) -> Tensor:
        height, width = _size(request, pipe.vae.config.sample_size, 2 * pipe.vae_scale_factor)
        negative, scale = request.negative or (None, request.guidance)
        image: Tensor = pipe(
            list(request.prompts),  # it writes to the list
            negative_prompt=[negative] * len(request.prompts) if negative else None,
            height=height,
            width=width,
            num_inference_steps=request.steps,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(request.seed + i) for i in range(len(request.prompts))],
            output_type="pt",
        ).images
        return image

    def save(image: Tensor) -> Tensor:
        return _levels(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image)))

    return _side(pipe.text_encoder, pipe.transformer, seen, pipe.vae, pipe.scheduler, run=run, save=save)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port on the CPU."""
    pipe = load(port, dtype=dtype, device="cpu")

    def run(request: Request) -> Tensor:
        height, width = _size(request, pipe.config.default_size(Req())[0], pipe.config.size_multiple())
        negative, scale = request.negative or (None, request.guidance)
        answer = pipe.generate(
            request.prompts, negative_prompt=negative, height=height, width=width, seed=request.seed,
            num_inference_steps=request.steps, guidance_scale=scale,
        )  # fmt: skip
        assert answer.output is not None  # the last stage verified it
        return answer.output

    encoder, transformer, vae, scheduler = (
        pipe.modules[name] for name in ("text_encoder", "transformer", "vae", "scheduler")
    )
    return _side(encoder, transformer, transformer, vae, scheduler, run=run, save=lambda image: _levels(to_pil(image)))


def _size(request: Request, side: int, multiple: int) -> tuple[int, int]:
    height, width = (max(multiple, int(part * side) // multiple * multiple) for part in request.part)
    return height, width


def _levels(pictures: list[Any]) -> Tensor:
    """PIL pictures -> uint8 (B, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def _side(
    encoder: Any, transformer: nn.Module, denoiser: nn.Module, vae: Any, scheduler: Any, *, run: Any, save: Any
) -> PipelineSide:
    stages = {"text_encoder": encoder, "denoiser": denoiser, "decoder": vae.decoder}
    return PipelineSide(stages, (encoder, transformer, vae), scheduler, run, save)


CASES = FamilyCases(
    components=(
        ComponentCase("transformer", RECIPE, HERE / "reference" / "transformer.safetensors", (DIFFUSERS,)),
        ComponentCase(
            "transformer",
            RECIPE,
            HERE / "reference" / "transformer-batch.safetensors",
            (NATIVE, DIFFUSERS),
            cross=(
                Cross(
                    DIFFUSERS,
                    NATIVE_VERSUS_DIFFUSERS,
                    call=_lists,
                    inputs=transformer_inputs,
                    whole=r"(layers|noise_refiner|context_refiner)\.\d+",
                ),
            ),
        ),
    ),
    pipelines={
        "ZImagePipeline": PipelineCase(
            diffusers_pipeline, native_pipeline, PROMPT, 8, 3.5, own=("places",), negative=NEGATIVE
        )
    },
    code=("conversions.z_image", "conversions.common", "runtime", "porter.core"),
)
