"""Tiny pipelines of diffusers, made of diffusers' and transformers' own classes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from runtime.loader import quiet_libraries

TOKENIZERS = Path(__file__).parents[2] / "porter" / "builtin" / "tiny_flux"
WORDS = 1000  # more than any of the tokenizers has
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 255, (32, 32, 3), dtype=np.uint8), "RGB")


@dataclass(frozen=True)
class Made:
    """How a pipeline is made, and what it is asked for: the fields of a request, and the settings of its own."""

    build: Callable[[], Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "a red circle"
    images: tuple[Image.Image, ...] = ()
    video: bool = False


def write(name: str, folder: Path) -> Path:
    """Save the pipeline `name` of `PIPELINES` as diffusers does."""
    torch.manual_seed(11)
    with quiet_libraries():
        pipe = PIPELINES[name].build()
        with torch.no_grad():  # away from 0 and 1, so that nothing is trivially equal
            for part in pipe.components.values():
                for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                    parameter.add_(torch.randn_like(parameter) * 0.03)
        pipe.save_pretrained(folder)
    return folder


def clip_words() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")


def t5_words() -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")


def letters() -> Any:
    """A tokenizer of letters, padding to the right."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", model_max_length=64,
    )  # fmt: skip


def clip(width: int = 32, *, projected: bool = False) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def t5(kind: str = "T5", width: int = 32) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, d_model=width, d_ff=37, d_kv=8, num_layers=2, num_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def gemma(width: int = 16) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=WORDS, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    ).eval()  # fmt: skip


def vae(levels: int = 2, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": (16, 32, 32, 32)[:levels], "latent_channels": 4, "norm_num_groups": 8,
            "sample_size": 32, **more,
        }
    )  # fmt: skip


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32),
            "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
            "sample_size": 16, **more,
        }
    )  # fmt: skip


def stable_diffusion(kind: str = "StableDiffusionPipeline", *, checked: bool = False) -> Any:
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    checker = images = None
    if checked:
        sizes: dict[str, Any] = {
            "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        }  # fmt: skip
        config = transformers.CLIPConfig(
            text_config=sizes, vision_config=sizes | {"image_size": 30, "patch_size": 6}, projection_dim=8
        )
        checker = StableDiffusionSafetyChecker(config)
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, use_fast=False
        )
    return getattr(diffusers, kind)(
        vae=vae(), text_encoder=clip(), tokenizer=clip_words(), unet=unet(), safety_checker=checker,
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        feature_extractor=images, requires_safety_checker=checked,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    import diffusers

    config: dict[str, Any] = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 6 * 8 + 32, "cross_attention_dim": 64, "use_linear_projection": True,
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(projected=True), tokenizer=clip_words(),
        tokenizer_2=clip_words(), unet=unet(**config), scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def pixart() -> Any:
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=vae(), scheduler=diffusers.DPMSolverMultistepScheduler(), text_encoder=t5(),
        tokenizer=t5_words(),
    )  # fmt: skip


def ltx() -> Any:
    import diffusers

    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False), upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=transformer, vae=autoencoder, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(), tokenizer=t5_words(),
    )  # fmt: skip


def sana() -> Any:
    import diffusers

    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate", downsample_block_type="stride_conv", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, vae=autoencoder, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=gemma(), tokenizer=letters(),
    )  # fmt: skip


def aura_flow() -> Any:
    import diffusers

    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, out_channels=4, caption_projection_dim=32, joint_attention_dim=32,
        pos_embed_max_size=256,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=transformer, vae=vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5("UMT5"), tokenizer=letters(),
    )  # fmt: skip


def lumina2() -> Any:
    import diffusers

    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=16,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, vae=vae(levels=4, shift_factor=0.1, scaling_factor=0.6),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=gemma(), tokenizer=letters(),
    )  # fmt: skip


def cogvideox() -> Any:
    import diffusers

    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        transformer=transformer, vae=autoencoder, scheduler=diffusers.CogVideoXDDIMScheduler(), text_encoder=t5(),
        tokenizer=t5_words(),
    )  # fmt: skip


def dit() -> Any:
    import diffusers

    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler())


def ddpm() -> Any:
    import diffusers

    model = diffusers.UNet2DModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=8, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())


def consistency() -> Any:
    import diffusers

    model = diffusers.UNet2DModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=8, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    )  # fmt: skip
    return diffusers.ConsistencyModelPipeline(unet=model, scheduler=diffusers.CMStochasticIterativeScheduler())


def stable_video_diffusion() -> Any:
    """Its picture stands for a prompt."""
    import diffusers
    import transformers

    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    seeing = transformers.CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=224,
        intermediate_size=37, patch_size=56,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=autoencoder, unet=model, image_encoder=transformers.CLIPVisionModelWithProjection(seeing).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
            prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, steps_offset=1,
            timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        ),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, use_fast=False
        ),
    )  # fmt: skip


def text_to_video() -> Any:
    """A call that makes one video of each prompt, and calls back the former way."""
    import diffusers

    model = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    return diffusers.TextToVideoSDPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_words(), unet=model,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
    )  # fmt: skip


def hunyuan_video() -> Any:
    import diffusers
    import transformers

    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    words = letters()
    return diffusers.HunyuanVideoPipeline(
        transformer=transformer, vae=autoencoder, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=transformers.LlamaModel(
            transformers.LlamaConfig(
                vocab_size=WORDS, hidden_size=16, intermediate_size=37, num_hidden_layers=3, num_attention_heads=2,
                pad_token_id=0, eos_token_id=1, bos_token_id=2,
            )
        ).eval(), tokenizer=words, text_encoder_2=clip(), tokenizer_2=clip_words(),
    )  # fmt: skip


def flux2_klein() -> Any:
    """Its text encoder's last matrix is tied to the first one, and its autoencoder has a table of counts."""
    import diffusers
    import transformers

    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    words = letters()
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    return diffusers.Flux2KleinPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, pad_token_id=0,
            )
        ).eval(), tokenizer=words, is_distilled=False,
    )  # fmt: skip


_SD: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 4.0}
PIPELINES: dict[str, Made] = {
    "sd": Made(stable_diffusion, {**_SD, "negative_prompt": "green"}, {"guidance_rescale": 0.5}),
    "sd-checked": Made(partial(stable_diffusion, checked=True), _SD, {"eta": 0.0}),
    "sdxl": Made(stable_diffusion_xl, _SD, {"prompt_2": "a blue square", "original_size": [64, 48]}),
    "sd-img2img": Made(
        partial(stable_diffusion, "StableDiffusionImg2ImgPipeline"),
        {"num_inference_steps": 4, "negative_prompt": "green"}, {"strength": 0.75}, images=(PICTURE,),
    ),
    "pixart-sigma": Made(pixart, _SD, {"use_resolution_binning": False, "clean_caption": False}),
    "ltx": Made(
        ltx, {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "fps": 20,
              "max_sequence_length": 16},
        video=True,
    ),
    "sana": Made(
        sana, {**_SD, "max_sequence_length": 16},
        {"use_resolution_binning": False, "complex_human_instruction": None, "clean_caption": False},
    ),
    "aura-flow": Made(aura_flow, _SD),
    "lumina2": Made(lumina2, {**_SD, "max_sequence_length": 16}, {"cfg_normalization": False}),
    "cogvideox": Made(
        cogvideox, {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16},
        video=True,
    ),
    "svd": Made(
        stable_video_diffusion, {"height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 2, "fps": 9},
        {"motion_bucket_id": 100, "decode_chunk_size": 1}, prompt="", images=(PICTURE,), video=True,
    ),
    "text-to-video": Made(text_to_video, {**_SD, "num_frames": 2, "negative_prompt": "green"}, video=True),
    "hunyuan-video": Made(
        hunyuan_video, {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2,
                        "max_sequence_length": 16},
        {"prompt_template": {"template": "say {}", "crop_start": 4}}, video=True,
    ),
    "flux2-klein": Made(
        flux2_klein, {**_SD, "max_sequence_length": 32}, {"text_encoder_out_layers": [1, 2, 3]},
        images=(PICTURE.resize((64, 64)),),
    ),
    "dit": Made(dit, {"num_inference_steps": 3}, {"class_labels": [7]}, prompt=""),
    "ddpm": Made(ddpm, {"num_inference_steps": 3}, prompt=""),
    "consistency": Made(consistency, {"num_inference_steps": 2}, {"class_labels": 2}, prompt=""),
}  # fmt: skip
