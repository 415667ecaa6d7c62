"""Released denoisers as facts: what their configs say, and the shapes that their pipelines call them with.

Configs name what differs from the class defaults of the installed diffusers. Sizes are pixels and frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers

from porter.core.workload import Workload, full_config
from tests import denoiser_inputs as inputs
from tests.memory_tracker import Measured, measure

DEPTHS = (
    "num_layers", "num_single_layers", "n_layers", "num_mmdit_layers", "num_single_dit_layers", "num_visual_blocks",
)  # fmt: skip
Inputs = Callable[[Mapping[str, Any], Workload], dict[str, Any]]


@dataclass(frozen=True)
class Denoiser:
    """A released denoiser.

    Attributes:
        config: keyword arguments of the class.
        shapes: (full config, workload) -> what `tests.memory_tracker.measure` makes tensors of.
        base: the size it is used at, with its prompt's length and its autoencoder's compression.
        other: another height, width and number of frames.
        few: what else must change with four blocks of each kind.
        batches: those that the class can be called with.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    shapes: Inputs
    base: Workload
    other: tuple[int, int, int]
    few: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 2)

    def full(self) -> dict[str, Any]:
        """The config with the defaults of the class."""
        return full_config("diffusers", self.class_name, self.config)

    def shallow(self) -> Denoiser:
        """The same widths with four blocks of each kind: the peak lies in one block, however many there are."""
        cut: dict[str, Any] = {key: 4 for key in DEPTHS if (self.full().get(key) or 0) > 4}
        if layers := self.config.get("llama_layers"):
            cut["llama_layers"] = layers[-cut["num_layers"] - cut["num_single_layers"] :]  # Llama gives all of its own
        return replace(self, config=self.config | cut | self.few)

    def measured(self, work: Workload, explain: bool = False) -> Measured:
        """What torch's tracker sees."""
        build = getattr(diffusers, self.class_name)
        given = self.shapes(self.full(), work)
        experts = self.full().get("num_routed_experts") or 1
        return measure(
            lambda: build(**self.config), given, work.dtype, explain=explain, read=work.text_tokens, experts=experts
        )

    def points(self) -> list[Workload]:
        """Two sizes, with batches of 1 and 2 where both are possible, in bfloat16 and float32."""
        height, width, frames = self.other
        sizes = [self.base, replace(self.base, height=height, width=width, frames=frames)]
        return [
            replace(size, batch=batch, dtype=dtype)
            for dtype in ("BF16", "F32")
            for size in sizes
            for batch in self.batches
        ]


_WAN = {"ffn_dim": 13824, "num_layers": 40, "num_attention_heads": 40}
_WAN_VIDEO = Workload(height=480, width=832, frames=81, temporal=4)
_SKYREELS = Workload(height=544, width=960, frames=97, temporal=4)
_FORCED = replace(_SKYREELS, frame_timesteps=True)
_SD3 = Workload(text_tokens=256)
_COG = {
    "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "sample_width": 90,
    "sample_height": 60, "sample_frames": 49, "in_channels": 16,
}  # fmt: skip
_SANA = {"in_channels": 32, "out_channels": 32}
_QWEN = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60}
_LTX2 = Workload(height=512, width=768, frames=121, text_tokens=1024, spatial=32, temporal=8)
_SMALL = (512, 768, 1)
DENOISERS = [
    Denoiser("FLUX.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True}, inputs.flux, Workload(), _SMALL),
    Denoiser("FLUX.2-dev", "Flux2Transformer2DModel", {"num_layers": 8}, inputs.flux2, Workload(), _SMALL),
    Denoiser(
        "FLUX.2-klein-4B", "Flux2Transformer2DModel",
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        }, inputs.flux2, Workload(), _SMALL,
    ),
    Denoiser(
        "SD3-medium", "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        }, inputs.sd3, _SD3, _SMALL,
    ),
    Denoiser(
        "SD3.5-medium", "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        }, inputs.sd3, _SD3, _SMALL,
    ),
    Denoiser(
        "SD3.5-large", "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        }, inputs.sd3, _SD3, _SMALL,
    ),
    Denoiser(
        "Qwen-Image", "QwenImageTransformer2DModel", _QWEN, inputs.qwen, Workload(height=1328, width=1328), _SMALL,
    ),
    Denoiser("Z-Image-Turbo", "ZImageTransformer2DModel", {}, inputs.z_image, Workload(), _SMALL),
    Denoiser(
        "Wan2.1-T2V-14B", "WanTransformer3DModel", _WAN, inputs.wan, replace(_WAN_VIDEO, height=720, width=1280),
        (480, 832, 49),
    ),
    Denoiser(
        "Wan2.1-T2V-1.3B", "WanTransformer3DModel", {"ffn_dim": 8960, "num_layers": 30, "num_attention_heads": 12},
        inputs.wan,
        _WAN_VIDEO, (480, 480, 33),
    ),
    Denoiser(
        "Wan2.1-I2V-14B", "WanTransformer3DModel",
        {**_WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, inputs.wan, _WAN_VIDEO, (720,
        1280, 33),
    ),
    Denoiser(
        "Wan2.1-VACE-1.3B", "WanVACETransformer3DModel",
        {"ffn_dim": 8960, "num_layers": 30, "num_attention_heads": 12, "vace_layers": tuple(range(0, 30, 2))},
        inputs.vace, _WAN_VIDEO, (512, 512, 49), {"vace_layers": (0, 2)},
    ),
    Denoiser(
        "Wan2.1-VACE-14B", "WanVACETransformer3DModel", _WAN, inputs.vace, replace(_WAN_VIDEO, height=720, width=1280),
        (480, 832, 49), {"vace_layers": (0, 2)},
    ),
    Denoiser(
        "Wan2.2-Animate-14B", "WanAnimateTransformer3DModel", {**_WAN, "image_dim": 1280, "added_kv_proj_dim": 5120},
        inputs.animate, replace(_WAN_VIDEO, height=720, width=1280, frames=77), (480, 832, 45),
        {"inject_face_latents_blocks": 2},
    ),
    Denoiser(
        "SkyReels-V2-DF-14B-540P", "SkyReelsV2Transformer3DModel", _WAN, inputs.skyreels, _FORCED, (480, 832, 49),
    ),
    Denoiser(
        "SkyReels-V2-T2V-14B-540P", "SkyReelsV2Transformer3DModel", _WAN, inputs.skyreels, _SKYREELS, (480, 832, 49),
    ),
    Denoiser(
        "SkyReels-V2-DF-1.3B-540P", "SkyReelsV2Transformer3DModel",
        {"ffn_dim": 8960, "num_layers": 30, "num_attention_heads": 12, "inject_sample_info": True}, inputs.skyreels,
        _FORCED, (480, 832, 49), batches=(1,),  # diffusers 0.42 adds the frame rate's embedding to one video only
    ),
    Denoiser(
        "HunyuanVideo", "HunyuanVideoTransformer3DModel", {"guidance_embeds": True}, inputs.hunyuan,
        Workload(height=720, width=1280, frames=129, text_tokens=256, temporal=4), (544, 960, 61),
    ),
    Denoiser(
        "LTX-Video", "LTXVideoTransformer3DModel", {}, inputs.ltx,
        Workload(height=512, width=704, frames=161, text_tokens=128, spatial=32, temporal=8), (768, 1152, 97),
    ),
    Denoiser(
        "Mochi-1", "MochiTransformer3DModel", {}, inputs.mochi,
        Workload(height=480, width=848, frames=85, text_tokens=256, temporal=6), (480, 480, 19),
    ),
    Denoiser(
        "CogVideoX-5b", "CogVideoXTransformer3DModel", _COG, inputs.cogvideox,
        Workload(height=480, width=720, frames=49, text_tokens=226, temporal=4), (480, 480, 17),
    ),
    Denoiser(
        "CogVideoX-2b", "CogVideoXTransformer3DModel", {"num_attention_heads": 30, "num_layers": 30},
        inputs.cogvideox,
        Workload(height=480, width=720, frames=49, text_tokens=226, temporal=4), (480, 720, 49),
    ),
    Denoiser(
        "CogVideoX1.5-5B", "CogVideoXTransformer3DModel",
        {**_COG, "sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_size_t": 2,
        "patch_bias": False},
        inputs.cogvideox, Workload(height=768, width=1360, frames=81, text_tokens=226, temporal=4), (480, 720, 49),
    ),
    Denoiser(
        "Sana-1600M", "SanaTransformer2DModel", _SANA, inputs.sana, Workload(text_tokens=300, spatial=32), (2048,
        2048, 1),
    ),
    Denoiser(
        "Sana1.5-4.8B", "SanaTransformer2DModel", {**_SANA, "num_layers": 60, "qk_norm": "rms_norm_across_heads"},
        inputs.sana,
        Workload(text_tokens=300, spatial=32), (2048, 2048, 1),
    ),
    Denoiser(
        "PixArt-Sigma-XL-2", "PixArtTransformer2DModel", {"caption_channels": 4096,
        "use_additional_conditions": False},
        inputs.pixart, Workload(text_tokens=300), _SMALL,
    ),
    Denoiser(
        "AuraFlow-v0.3", "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 4, "num_single_dit_layers": 32, "pos_embed_max_size": 9216}, inputs.auraflow,
        Workload(text_tokens=256), (1536, 1536, 1),
    ),
    Denoiser(
        "Lumina-Image-2.0", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, inputs.lumina2,
        Workload(text_tokens=256), _SMALL,
    ),
    Denoiser(
        "CogView4-6B", "CogView4Transformer2DModel", {"num_layers": 28, "num_attention_heads": 32,
        "attention_head_dim": 128, "text_embed_dim": 4096}, inputs.cogview4,
        Workload(text_tokens=1024), _SMALL,
    ),
    Denoiser("Chroma1-HD", "ChromaTransformer2DModel", {}, inputs.chroma, Workload(), _SMALL),
    Denoiser("DiT-XL-2-256", "DiTTransformer2DModel", {}, inputs.dit, Workload(height=256, width=256), (512, 512, 1)),
    Denoiser(
        "HunyuanDiT-v1.2", "HunyuanDiT2DModel",
        {
            "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "cross_attention_dim": 1024,
            "cross_attention_dim_t5": 2048, "use_style_cond_and_image_meta_size": False,
        }, inputs.hunyuan_dit, Workload(text_tokens=256), (1024, 768, 1),
    ),
    Denoiser(
        "Kandinsky-5.0-T2V-Lite", "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 3584, "in_text_dim2": 768, "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792,
            "ff_dim": 7168, "num_text_blocks": 2, "num_visual_blocks": 32, "axes_dims": (16, 24, 24),
            "visual_cond": True,
        }, inputs.kandinsky5, Workload(height=512, width=768, frames=121, temporal=4), (512, 512, 61),
    ),
    Denoiser(
        "HunyuanVideo-1.5", "HunyuanVideo15Transformer3DModel", {"task_type": "t2v"}, inputs.hunyuan15,
        Workload(height=480, width=848, frames=121, text_tokens=1000, spatial=16, temporal=4), (720, 1280, 121),
    ),
    Denoiser(
        "HiDream-I1-Full", "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
            "axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16],
        }, inputs.hidream, Workload(text_tokens=128), (768, 1344, 1),
    ),
    Denoiser(
        "LTX-2", "LTX2VideoTransformer3DModel", {"rope_type": "split"}, inputs.ltx2, _LTX2, (1024, 1536, 121),
    ),
    Denoiser(
        "LTX-2.3", "LTX2VideoTransformer3DModel",
        {
            "rope_type": "split", "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
            "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True,
        }, inputs.ltx2, _LTX2, (1024, 1536, 121),
    ),
    Denoiser("GLM-Image", "GlmImageTransformer2DModel", {}, inputs.glm_image, Workload(text_tokens=64), _SMALL),
]  # fmt: skip
