"""How much travels for a repository of FLUX.1-dev's size: sparse files with the real tensors' names and shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversions.common.autoencoder_kl import recipe as autoencoder
from conversions.flux1 import recipe as flux1
from porter.core.checkpoint import TensorInfo, header_bytes, spec
from tests.core.test_hub import environment, model_requests, planned
from tests.hub_server import Fault, hub_server

Shapes = dict[str, tuple[int, ...]]
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": None,
    "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def t5() -> Shapes:
    """The encoder of T5 v1.1 XXL."""
    shapes: Shapes = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for block in range(24):
        attention, feed = (f"encoder.block.{block}.layer.{layer}" for layer in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (4096, 4096) for name in "kqvo"}
        shapes |= {f"{feed}.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (4096, 10240)
        shapes |= {f"{place}.layer_norm.weight": (4096,) for place in (attention, feed)}
    return shapes


def clip() -> Shapes:
    """The text encoder of CLIP ViT-L/14."""
    shapes: Shapes = {"text_model.embeddings.token_embedding.weight": (49408, 768)}
    shapes["text_model.embeddings.position_embedding.weight"] = (77, 768)
    sizes = {f"self_attn.{name}_proj": (768, 768) for name in "kqv"} | {"self_attn.out_proj": (768, 768)}
    sizes |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072), "layer_norm1": (768,), "layer_norm2": (768,)}
    places = {f"encoder.layers.{layer}.{name}": size for layer in range(12) for name, size in sizes.items()}
    for name, size in (places | {"final_layer_norm": (768,)}).items():
        shapes |= {f"text_model.{name}.weight": size, f"text_model.{name}.bias": size[:1]}
    return shapes


def bf16(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: spec("BF16", shape, name) for name, shape in shapes.items()}


def sparse(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A whole safetensors file whose data was never written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header_bytes(tensors.values(), {"format": "pt"}))
    os.truncate(path, path.stat().st_size + sum(info.nbytes for info in tensors.values()))


def sharded(folder: Path, stem: str, tensors: Mapping[str, TensorInfo], count: int) -> None:
    """Shards of about the same size, and their index."""
    limit = sum(info.nbytes for info in tensors.values()) / count
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if len(shards) < count and sum(other.nbytes for other in shards[-1].values()) > limit:
            shards.append({})
        shards[-1][name] = info
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        sparse(folder / name, shard)
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def flux_dev(root: Path) -> None:
    """FLUX.1-dev's files, as they lie on the hub."""
    sparse(root / "flux1-dev.safetensors", flux1.original_headers(TRANSFORMER, "BF16"))
    sparse(root / "ae.safetensors", autoencoder.original_headers(VAE, "F32"))
    sharded(root / "transformer", "diffusion_pytorch_model", flux1.diffusers_headers(TRANSFORMER, "BF16"), 3)
    sharded(root / "text_encoder_2", "model", bf16(t5()), 2)
    sparse(root / "text_encoder" / "model.safetensors", bf16(clip()))
    sparse(root / "vae" / "diffusion_pytorch_model.safetensors", autoencoder.diffusers_headers(VAE, "BF16"))
    documents: dict[str, Any] = {
        "model_index": INDEX, "transformer/config": TRANSFORMER, "vae/config": VAE,
        "text_encoder/config": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
        "text_encoder_2/config": {"architectures": ["T5EncoderModel"], "model_type": "t5"},
        "scheduler/scheduler_config": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "tokenizer/tokenizer_config": {"tokenizer_class": "CLIPTokenizer"},
        "tokenizer_2/tokenizer_config": {"tokenizer_class": "T5Tokenizer"},
        "tokenizer/vocab": {f"word{number}</w>": number for number in range(49408)},
        "tokenizer_2/tokenizer": {"model": {"vocab": [[f"▁word{number}", -9.5] for number in range(32000)]}},
    }  # fmt: skip
    for name, document in documents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(document, indent=2))


def test_at_most_two_megabytes_travel(tmp_path: Path) -> None:
    flux_dev(tmp_path / "hub" / "acme" / "flux")
    total = sum(path.stat().st_size for path in (tmp_path / "hub").rglob("*") if path.is_file())
    assert total > 57e9 and sum(path.stat().st_blocks for path in (tmp_path / "hub").rglob("*")) * 512 < 50e6
    with hub_server(tmp_path / "hub") as server:
        env = environment(server, tmp_path / "home")
        done = planned(env, "acme/flux", "--json")
        assert done.returncode == 0, done.stderr
        sent, asked = server.sent, model_requests(server)
        assert sent < 2_000_000, sent
        assert len(asked) < 50, asked
        parameters = {part["name"]: part["parameters"] for part in json.loads(done.stdout)["components"]}
        # What the hub and the released configs say of FLUX.1-dev.
        assert parameters["transformer"] == 11_901_408_320
        assert parameters["text_encoder_2"] == 4_762_310_656 and parameters["text_encoder"] == 123_060_480
        assert parameters["vae"] == 83_819_683

        # A second plan asks where the branch stands, and nothing else; an unreachable hub still answers offline.
        server.faults["acme/flux"] = Fault("file", status=500)
        again = planned(env, "acme/flux", "--json")
        assert again.stdout == done.stdout and len(model_requests(server)) == len(asked) + 1
        print(f"{total / 1e9:.1f} GB planned with {sent / 1e6:.2f} MB in {len(asked)} requests")
    offline = planned(environment(None, tmp_path / "home"), "acme/flux", "--json", "--offline")
    assert offline.stdout == done.stdout, offline.stderr
