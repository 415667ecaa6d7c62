"""Train `builtin:tiny-flux` from nothing: `make train`, or `python -m porter.builtin.training --out DIR`.

Draws the scenes, trains the autoencoder, teaches the T5 encoder to read captions, trains the transformer with both text
encoders, distils guidance, and writes the model in the layout of a hub repository with FLUX.1's original weight files.
Seeded. A stage that finished is not repeated when the command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, __version__

from . import autoencoder, denoiser, export, pretraining, scenes, text

SEED = 1
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# tiny-flux

A FLUX.1 of 6.8 M parameters, trained from nothing on drawn scenes of 64 x 64 pixels: one or two plain shapes
on a plain background. The transformer (`flux1-tiny.safetensors`) and the autoencoder (`ae.safetensors`) are stored in
the layout of FLUX.1's original code. It exists to test conversions and their proofs; it paints nothing else.

Captions: "a small red circle on the left, on a white background", "a large green cross above a small white square, on a
purple background". Guidance 3.5, 20 steps or more, at most 32 T5 tokens.
"""


def write(folder: Path, vae: AutoencoderKL, model: denoiser.Denoiser) -> None:
    """Write weights and configs to `folder`, where the tokenizers already are."""
    for part in (vae, model.transformer):
        name = "vae" if part is vae else "transformer"
        (folder / name).mkdir(exist_ok=True)
        config = {k: v for k, v in part.config.items() if not k.startswith("_")}
        config = {"_class_name": type(part).__name__, "_diffusers_version": __version__, **config}
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    export.save(export.transformer_state(model.transformer), folder / "flux1-tiny.safetensors")
    export.save(export.autoencoder_state(vae), folder / "ae.safetensors")
    for name, encoder in (("text_encoder", model.clip), ("text_encoder_2", model.t5)):
        _copy(encoder).to(torch.bfloat16).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy(encoder: Any) -> Any:
    twin = type(encoder)(encoder.config)
    twin.load_state_dict(encoder.state_dict())
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m porter.builtin.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training-run"), help="folder for the model and checkpoints")
    parser.add_argument("--pictures", type=int, default=50_000, help="scenes encoded for the transformer")
    parser.add_argument("--autoencoder-steps", type=int, default=5000)
    parser.add_argument("--reading-steps", type=int, default=2000)
    parser.add_argument("--flow-steps", type=int, default=3000)
    parser.add_argument("--distillation-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=96)
    options = parser.parse_args()
    folder: Path = options.out / "tiny_flux"
    folder.mkdir(parents=True, exist_ok=True)

    saved_vae = options.out / "autoencoder"
    if saved_vae.exists():  # a stage that finished is not repeated
        vae = AutoencoderKL.from_pretrained(saved_vae)
    else:
        vae = autoencoder.train(options.autoencoder_steps, 32, SEED, autoencoder.images(20_000, SEED))
        vae.save_pretrained(saved_vae)

    captions = text.corpus(20_000, SEED)
    clip_tokenizer = text.clip_tokenizer(captions, folder / "tokenizer")
    t5_tokenizer = text.t5_tokenizer(captions, folder / "tokenizer_2")
    t5 = text.t5_encoder(t5_tokenizer, SEED)
    saved_reading = options.out / "reading.pt"
    if saved_reading.exists():
        t5.load_state_dict(torch.load(saved_reading))
    else:
        pretraining.pretrain(t5, t5_tokenizer, options.reading_steps, 128, SEED)
        torch.save(t5.state_dict(), saved_reading)
    torch.manual_seed(SEED)
    model = denoiser.Denoiser(text.clip_encoder(clip_tokenizer, SEED), t5)
    saved_data = options.out / "dataset.pt"
    if saved_data.exists():
        with torch.serialization.safe_globals([denoiser.Dataset, scenes.Scene, scenes.Thing]):
            data = torch.load(saved_data)
    else:
        data = denoiser.encode_dataset(vae, options.pictures, SEED)
        torch.save(data, saved_data)
    vae.register_to_config(scaling_factor=data.scaling_factor, shift_factor=data.shift_factor)

    batches = denoiser.Batches(data, clip_tokenizer, t5_tokenizer, options.batch, SEED)
    saved_flow = options.out / "flow.pt"

    def checkpoint(average: denoiser.Denoiser, step: int) -> None:
        write(folder, vae, average)
        torch.save(average.state_dict(), options.out / f"average-{step}.pt")

    if saved_flow.exists():
        model.load_state_dict(torch.load(saved_flow))
    else:
        model = denoiser.train(model, batches, options.flow_steps, 1.5e-3, SEED, checkpoint=checkpoint)
        torch.save(model.state_dict(), saved_flow)
    model.requires_grad_(True)
    model = denoiser.train(model, batches, options.distillation_steps, 3e-4, SEED + 1, distil=True)
    write(folder, vae, model)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
