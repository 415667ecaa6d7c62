"""Record the family's reference traces with the original FLUX code on original-layout files.

    python -m conversions.flux1.record --reference-repo <checkout of black-forest-labs/flux>

writes `conversions/flux1/reference/{transformer,vae}.safetensors` from `builtin:tiny-flux`. It reads the original files
and the two config.json beside them, never a converted file, and imports nothing of the recipes. `--model` names another
folder of original-layout files; `--samples 0` keeps every element of every module (for a live comparison).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import parity.recorder as recorder
from conversions.flux1.record_fill import ORIGINALS
from parity.recorder import Watch, file_sha256, owners, record
from parity.reference import commit_of
from porter.core.errors import BadInputError, MissingError, PorterError, UsageError

__all__ = ["ORIGINALS"]  # of `conversions.record_reference`, beside what is recorded here
COMMIT = "802fb4713906133fcbd0d8dc5351620ca4773036"
REPOSITORY = "https://github.com/black-forest-labs/flux"
HERE = Path(__file__).parent
COMPONENTS = ("transformer", "vae")
CODE = ("model.py", "math.py", "modules/layers.py", "modules/autoencoder.py")


def import_original(repository: Path) -> Path:
    """Make `flux.*` importable from an unedited checkout -> the package's folder.

    The package's own `__init__` is left out (it only computes a version); its modules are imported as they are.
    """
    package = repository / "src" / "flux"
    if not (package / "model.py").is_file():
        raise MissingError(
            f"{repository} is not a checkout of the original FLUX code",
            expected="src/flux/model.py",
            hint=f"git clone {REPOSITORY} && git -C flux checkout {COMMIT}",
        )
    if importlib.util.find_spec("einops") is None:
        raise MissingError("the original FLUX code needs einops", hint="python -m pip install einops")
    module = types.ModuleType("flux")
    module.__path__ = [str(package)]
    sys.modules["flux"] = module
    return package


def build_transformer(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The original `Flux` with its weights. What tensors don't hold (RoPE axes) comes from the source's config.json."""
    original = importlib.import_module("flux.model")
    depth, singles = (
        1 + max(int(m[1]) for k in state if (m := re.match(rf"{kind}_blocks\.(\d+)\.", k)))
        for kind in ("double", "single")
    )
    hidden, head = state["img_in.weight"].shape[0], state["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    params = original.FluxParams(
        in_channels=state["img_in.weight"].shape[1],
        out_channels=state["final_layer.linear.weight"].shape[0],
        vec_in_dim=state["vector_in.in_layer.weight"].shape[1],
        context_in_dim=state["txt_in.weight"].shape[1],
        hidden_size=hidden,
        mlp_ratio=state["double_blocks.0.img_mlp.0.weight"].shape[0] / hidden,
        num_heads=hidden // head,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=list(config["axes_dims_rope"]),
        theta=10_000,
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in state,
        guidance_embed="guidance_in.in_layer.weight" in state,
    )
    return _filled(original.Flux(params), state)


def build_autoencoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The original `AutoEncoder` with its weights; scale and shift come from the source's config.json."""
    original = importlib.import_module("flux.modules.autoencoder")
    levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    base = state["encoder.conv_in.weight"].shape[0]
    params = original.AutoEncoderParams(
        resolution=config["sample_size"],
        in_channels=state["encoder.conv_in.weight"].shape[1],
        ch=base,
        out_ch=state["decoder.conv_out.weight"].shape[0],
        ch_mult=[width // base for width in widths],
        num_res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in state),
        z_channels=state["encoder.conv_out.weight"].shape[0] // 2,
        scale_factor=config["scaling_factor"],
        shift_factor=config["shift_factor"],
    )
    return _filled(original.AutoEncoder(params, sample_z=False), state)


def _filled(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load strictly, in float32."""
    module.load_state_dict({k: t.float() for k, t in state.items()}, strict=True)
    return module.float().eval()


def transformer_inputs(model: Any, seed: int) -> dict[str, Tensor]:
    """Two different images of 4 x 2 patches, 7 text tokens; times, guidance and ids differ along every axis."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(4, 2, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4.0)[:, None], torch.arange(2.0)[None, :]
    p = model.params
    inputs = {
        "img": torch.randn(2, 8, p.in_channels, generator=draw),
        "img_ids": ids.reshape(1, 8, 3).repeat(2, 1, 1),
        "txt": torch.randn(2, 7, p.context_in_dim, generator=draw),
        "txt_ids": torch.zeros(2, 7, 3),
        "timesteps": torch.tensor([0.9375, 0.21]),
        "y": torch.randn(2, p.vec_in_dim, generator=draw),
    }
    return inputs | ({"guidance": torch.tensor([3.5, 1.75])} if p.guidance_embed else {})


def autoencoder_inputs(model: Any, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents of 2 x 3 (attention over one would say nothing) and an image in [-1, 1] for them: (encode, decode)."""
    draw = torch.Generator().manual_seed(seed)
    down = 2 ** (len(model.params.ch_mult) - 1)
    image = torch.rand(1, model.params.in_channels, 2 * down, 3 * down, generator=draw) * 2 - 1
    latents = torch.randn(1, model.params.z_channels, 2, 3, generator=draw)
    return {"x": image}, {"z": latents}


def watches(model: nn.Module, whole: str, samples: int) -> list[Watch]:
    """Everything of the modules matching `whole`; of the modules that own parameters, `samples` elements (0: all)."""
    leaves = [path for path in owners(model) if path]
    return [Watch(whole), Watch("|".join(map(re.escape, leaves)), samples or None)]


def record_component(component: str, model_dir: Path, repository: Path, *, seed: int, samples: int) -> Any:
    """Run the original code of one component -> Recording."""
    package = import_original(repository)
    config_file = model_dir / component / "config.json"
    source = find_source(component, model_dir)
    if not config_file.is_file():
        raise MissingError(f"no {component}/config.json beside {source.name}", hint="see `porter plan` of the model")
    config, state = json.loads(config_file.read_text()), load_file(source)
    commit = commit_of(repository)
    try:
        if component == "transformer":
            module = build_transformer(state, config)
            passes = {"forward": (lambda m, x: m(**x), transformer_inputs(module, seed))}
            whole = r"(double|single)_blocks\.\d+"
        else:
            module = build_autoencoder(state, config)
            pixels, latents = autoencoder_inputs(module, seed)
            passes = {"encode": (lambda m, x: m.encode(**x), pixels), "decode": (lambda m, x: m.decode(**x), latents)}
            whole = r"encoder|decoder|.*\.(block\.\d+|block_\d|attn_1|upsample|downsample)"
    except (RuntimeError, KeyError) as error:
        raise BadInputError(f"the original code does not load {source.name}", found=str(error)[:2000]) from error
    options = f" --seed {seed}" + (f" --samples {samples}" if samples != SAMPLES else "")
    meta = {
        "component": component,
        "reference": {
            "name": type(module).__module__ + ":" + type(module).__qualname__,
            "repository": REPOSITORY,
            "commit": commit,
            "files": {name: file_sha256(package / name) for name in CODE},
        },
        "command": f"python -m conversions.flux1.record --reference-repo <checkout>{options}",
        "recorder": file_sha256(Path(recorder.__file__)),
        "source": {"file": source.name, "sha256": file_sha256(source), "bytes": source.stat().st_size},
        "config": {"file": f"{component}/config.json", "sha256": file_sha256(config_file)},
        "seed": seed,
    }
    return record(module, passes, watches(module, whole, samples), meta)


def find_source(component: str, model_dir: Path) -> Path:
    """The original-layout file of a component: the one safetensors file with its landmark tensors."""
    from safetensors import safe_open

    landmark = {"transformer": "double_blocks.0.img_attn.qkv.weight", "vae": "decoder.conv_in.weight"}[component]
    for path in sorted(p for p in model_dir.iterdir() if p.suffix in (".safetensors", ".sft")):
        with safe_open(str(path), "pt") as f:
            if landmark in f.keys():  # noqa: SIM118 (safe_open has no `in`)
                return path
    raise MissingError(f"no original-layout {component} in {model_dir}", expected=f"a file that holds {landmark}")


SAMPLES = 96  # of each small module; keeps both traces under 1 MB


def main(argv: Sequence[str] | None = None) -> int:
    """Write the traces; prints their paths and sizes."""
    parser = argparse.ArgumentParser(description="Record the original FLUX code on original-layout files.")
    parser.add_argument("--reference-repo", required=True, type=Path, help=f"checkout of {REPOSITORY} at {COMMIT[:7]}")
    parser.add_argument("--model", default="builtin:tiny-flux", help="folder with the original files")
    parser.add_argument("--component", action="append", choices=COMPONENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="elements kept of each small module; 0: all")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "reference")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    if options.model.startswith("builtin:"):
        from porter.builtin import locate  # the folder of an embedded model

        model_dir = locate(options.model.removeprefix("builtin:")) or Path(options.model)
    else:
        model_dir = Path(options.model)
    if not model_dir.is_dir():
        raise UsageError(f"{model_dir} is not a folder of original-layout files")
    if options.out == HERE / "reference" and not commit_of(options.reference_repo):
        raise UsageError("a trace of the project names its commit", hint="give a git checkout as --reference-repo")
    options.out.mkdir(parents=True, exist_ok=True)
    for component in options.component or COMPONENTS:
        path = options.out / f"{component}.safetensors"
        record_component(component, model_dir, options.reference_repo, seed=options.seed, samples=options.samples).save(
            path
        )
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except PorterError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
