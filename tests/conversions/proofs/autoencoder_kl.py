"""AutoencoderKL, as Stable Diffusion 1.x, 2.x, XL, 3 and FLUX.1 have it."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from tests.conversions.proofs import Config, Proof, Real, Table, of_class


def _config(widths: tuple[int, ...], layers: int, latents: int, *, quant: bool, **more: object) -> Config:
    return {
        "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths), "block_out_channels": widths,
        "layers_per_block": layers, "act_fn": "silu", "latent_channels": latents, "norm_num_groups": 32,
        "scaling_factor": 0.18215, "shift_factor": None, "use_quant_conv": quant, "use_post_quant_conv": quant,
        "mid_block_add_attention": True, **more,
    }  # fmt: skip


_WIDTHS = (128, 256, 512, 512)
_SD1 = _config(_WIDTHS, 2, 4, quant=True)
_SDXL = {**_SD1, "scaling_factor": 0.13025}
_SD3 = _config(_WIDTHS, 2, 16, quant=False, scaling_factor=1.5305, shift_factor=0.0609)
_FLUX = {**_SD3, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_TINY = (32, 64, 64)

# As the training code names the loss's tensors; fewer and smaller.
_LOSS = {
    "loss.logvar": (), "loss.perceptual_loss.scaling_layer.shift": (1, 3, 1, 1),
    "loss.perceptual_loss.scaling_layer.scale": (1, 3, 1, 1), "loss.perceptual_loss.net.slice1.0.weight": (8, 3, 3, 3),
    "loss.perceptual_loss.net.slice1.0.bias": (8,), "loss.perceptual_loss.net.slice5.28.weight": (16, 8, 3, 3),
    "loss.perceptual_loss.lin0.model.1.weight": (1, 8, 1, 1), "loss.discriminator.main.0.weight": (8, 3, 4, 4),
    "loss.discriminator.main.0.bias": (8,), "loss.discriminator.main.2.weight": (16, 8, 4, 4),
    "loss.discriminator.main.3.running_mean": (16,), "loss.discriminator.main.3.num_batches_tracked": (),
}  # fmt: skip


def _real(name: str, config: Config, original: str, model: str) -> Real:
    shared = "common/autoencoder_kl"
    return Real(name, config, Table(shared, original, model, "original"), Table(shared, "AutoencoderKL", model,
                "diffusers"))  # fmt: skip


def _oracle(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(state, config)
    return converted


PROOFS = tuple(
    Proof(
        f"autoencoder-kl-{name}", "conversions.common.autoencoder_kl.recipe:AUTOENCODER", tiny,
        of_class("diffusers", "AutoencoderKL"), real, _oracle,
    )
    for name, tiny, real in (
        (
            "quant-convs", _config(_TINY, 1, 4, quant=True),
            (
                _real("Stable Diffusion 1.x, 2.x", _SD1, "AutoencoderKL", "Stable Diffusion 1.5"),
                _real("Stable Diffusion XL", _SDXL, "AutoencoderKL", "Stable Diffusion 1.5"),
            ),
        ),
        (
            "plain", _config(_TINY, 2, 5, quant=False, out_channels=4, shift_factor=0.0609),
            (
                _real("Stable Diffusion 3 and 3.5", _SD3, "AutoEncoder", "FLUX.1"),
                _real("FLUX.1", _FLUX, "AutoEncoder", "FLUX.1"),
            ),
        ),
        ("of-training", _config(_TINY, 1, 4, quant=True, _training=_LOSS), ()),
    )
)  # fmt: skip
