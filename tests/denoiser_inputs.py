"""What pipelines call their denoisers with: (full config, workload) -> keyword arguments, in shapes.

Each function is written for `tests.memory_tracker.measure`: a tuple of ints is a tensor in the model's dtype, a pair
(shape, dtype) a tensor of another, everything else is passed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from porter.core.workload import Workload

F32, I64, BOOL = torch.float32, torch.int64, torch.bool


class Shape(tuple):  # type: ignore[type-arg]
    """A tuple of numbers that is no tensor's shape, but an argument."""


def _packed(work: Workload) -> int:
    return (work.latent_height // 2) * (work.latent_width // 2)


def flux(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    batch, length, text = work.batch, _packed(work), work.text_tokens
    return {
        "hidden_states": (batch, length, 64), "encoder_hidden_states": (batch, text, 4096),
        "pooled_projections": (batch, 768), "timestep": (batch,), "guidance": ((batch,), F32),
        "img_ids": (length, 3), "txt_ids": (text, 3),
    }  # fmt: skip


def chroma(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    given = flux(config, work)
    del given["pooled_projections"], given["guidance"]
    return given | {"attention_mask": (work.batch, _packed(work) + work.text_tokens)}


def flux2(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    batch, length, text = work.batch, _packed(work), work.text_tokens
    return {
        "hidden_states": (batch, length, 128), "encoder_hidden_states": (batch, text, config["joint_attention_dim"]),
        "timestep": (batch,), "guidance": ((batch,), F32), "img_ids": ((batch, length, 4), I64),
        "txt_ids": ((batch, text, 4), I64),
    }  # fmt: skip


def sd3(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 16, work.latent_height, work.latent_width),
        "encoder_hidden_states": (work.batch, 77 + work.text_tokens, 4096), "pooled_projections": (work.batch, 2048),
        "timestep": (work.batch,),
    }  # fmt: skip


def qwen(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, _packed(work), 64), "encoder_hidden_states": (work.batch, work.text_tokens,
        3584),
        "encoder_hidden_states_mask": ((work.batch, work.text_tokens), I64), "timestep": (work.batch,),
        "img_shapes": [[Shape((1, work.latent_height // 2, work.latent_width // 2))]] * work.batch,
    }  # fmt: skip


def z_image(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "x": [(16, 1, work.latent_height, work.latent_width)] * work.batch, "t": (work.batch,),
        "cap_feats": [(work.text_tokens, 2560)] * work.batch,
    }  # fmt: skip


def _video(work: Workload, channels: int) -> tuple[int, ...]:
    return (work.batch, channels, work.latent_frames, work.latent_height, work.latent_width)


def wan(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    given: dict[str, Any] = {
        "hidden_states": _video(work, config["in_channels"]), "timestep": ((work.batch,), I64),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096),
    }  # fmt: skip
    if config.get("image_dim"):
        given["encoder_hidden_states_image"] = (work.batch, 257, config["image_dim"])
    return given


def vace(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """No reference picture, so the control latents have as many frames as the video."""
    control = {"control_hidden_states": _video(work, config["vace_in_channels"])}
    return wan(config, work) | control | {"control_hidden_states_scale": (len(config["vace_layers"]),)}


def animate(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """A segment; the reference picture is one latent frame more, before those of the pose."""
    size = config["motion_encoder_size"]
    pose, face = _video(work, config["latent_channels"]), (work.batch, 3, work.frames, size, size)
    given = wan(config, replace(work, frames=work.frames + work.temporal))
    return given | {"pose_hidden_states": pose, "face_pixel_values": face, "motion_encode_batch_size": None}


def skyreels(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """`fps` is an index, 1 for 24 frames a second."""
    if not work.frame_timesteps:
        return wan(config, work)
    times = {"timestep": ((work.batch, work.latent_frames), I64)}
    return wan(config, work) | times | {"enable_diffusion_forcing": True, "fps": [1] * work.batch}


def hunyuan(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": _video(work, 16), "timestep": (work.batch,), "pooled_projections": (work.batch, 768),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096), "guidance": (work.batch,),
        "encoder_attention_mask": (work.batch, work.text_tokens),
    }  # fmt: skip


def ltx(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    frames, height, width = work.latent_frames, work.latent_height, work.latent_width
    return {
        "hidden_states": (work.batch, frames * height * width, 128), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096),
        "encoder_attention_mask": (work.batch, work.text_tokens), "num_frames": frames, "height": height,
        "width": width,
        "rope_interpolation_scale": Shape((8 / 25, 32, 32)),
    }  # fmt: skip


def mochi(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": _video(work, 12), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096),
        "encoder_attention_mask": ((work.batch, work.text_tokens), BOOL),
    }  # fmt: skip


def cogvideox(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    batch, channels, frames, height, width = _video(work, config["in_channels"])
    patch_t = config.get("patch_size_t") or 1
    frames = -(-frames // patch_t) * patch_t
    positions = (frames // patch_t) * (height // 2) * (width // 2)
    rotary = [((positions, 64), F32)] * 2 if config.get("use_rotary_positional_embeddings") else None
    return {
        "hidden_states": (batch, frames, channels, height, width), "timestep": ((batch,), I64),
        "encoder_hidden_states": (batch, work.text_tokens, 4096), "image_rotary_emb": rotary,
    }  # fmt: skip


def sana(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 32, work.latent_height, work.latent_width), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 2304),
        "encoder_attention_mask": ((work.batch, work.text_tokens), I64),
    }  # fmt: skip


def pixart(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 4, work.latent_height, work.latent_width), "timestep": ((work.batch,), I64),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096),
        "encoder_attention_mask": (work.batch, work.text_tokens),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def auraflow(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 4, work.latent_height, work.latent_width), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 2048),
    }  # fmt: skip


def lumina2(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 16, work.latent_height, work.latent_width), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 2304),
        "encoder_attention_mask": ((work.batch, work.text_tokens), BOOL),
    }  # fmt: skip


def cogview4(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    size = ((work.batch, 2), F32)
    return {
        "hidden_states": (work.batch, 16, work.latent_height, work.latent_width), "timestep": ((work.batch,), I64),
        "encoder_hidden_states": (work.batch, work.text_tokens, 4096), "original_size": size, "target_size": size,
        "crop_coords": size,
    }  # fmt: skip


def glm_image(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    length, size = _packed(work), ((work.batch, 2), F32)
    return {
        "hidden_states": (work.batch, 16, work.latent_height, work.latent_width), "timestep": ((work.batch,), I64),
        "encoder_hidden_states": (work.batch, work.text_tokens, 1472), "target_size": size, "crop_coords": size,
        "prior_token_id": ((work.batch, length), I64), "prior_token_drop": ((work.batch, length), BOOL),
    }  # fmt: skip


def dit(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    return {
        "hidden_states": (work.batch, 4, work.latent_height, work.latent_width), "timestep": ((work.batch,), I64),
        "class_labels": ((work.batch,), I64),
    }  # fmt: skip


def hunyuan_dit(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    batch, rotary = work.batch, ((_packed(work), 88), F32)
    return {
        "hidden_states": (batch, 4, work.latent_height, work.latent_width), "timestep": ((batch,), I64),
        "encoder_hidden_states": (batch, 77, 1024), "text_embedding_mask": ((batch, 77), BOOL),
        "encoder_hidden_states_t5": (batch, work.text_tokens, 2048),
        "text_embedding_mask_t5": ((batch, work.text_tokens), BOOL), "image_meta_size": (batch, 6),
        "style": ((batch,), I64), "image_rotary_emb": [rotary, rotary],
    }  # fmt: skip


def kandinsky5(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    frames, height, width = work.latent_frames, work.latent_height, work.latent_width
    return {
        "hidden_states": (work.batch, frames, height, width, 16 * 2 + 1), "timestep": (work.batch,),
        "encoder_hidden_states": (work.batch, work.text_tokens, 3584), "pooled_projections": (work.batch, 768),
        "visual_rope_pos": [((size,), I64) for size in (frames, height // 2, width // 2)],
        "text_rope_pos": ((work.text_tokens,), I64),
    }  # fmt: skip


def hunyuan15(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """Latents with the picture's and its mask, which are zero without one; masks come in the model's dtype."""
    batch, text = work.batch, work.text_tokens
    return {
        "hidden_states": _video(work, config["in_channels"]), "timestep": (batch,),
        "encoder_hidden_states": (batch, text, config["text_embed_dim"]), "encoder_attention_mask": (batch, text),
        "encoder_hidden_states_2": (batch, 256, config["text_embed_2_dim"]), "encoder_attention_mask_2": (batch, 256),
        "image_embeds": (batch, 729, config["image_embed_dim"]),
    }  # fmt: skip


def hidream(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """The pipeline keeps the sides' ratio and makes of every size about 1024 x 1024 pixels; all of Llama's layers."""
    scale = math.sqrt(1024 * 1024 / (work.height * work.width))
    height, width = (int(side * scale // 16 * 16) // 8 for side in (work.height, work.width))
    return {
        "hidden_states": (work.batch, config["in_channels"], height, width), "timesteps": ((work.batch,), I64),
        "encoder_hidden_states_t5": (work.batch, work.text_tokens, 4096),
        "encoder_hidden_states_llama3": (32, work.batch, work.text_tokens, 4096),
        "pooled_embeds": (work.batch, config["text_emb_dim"]),
    }  # fmt: skip


def ltx2(config: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """24 frames and 25 latents of sound a second; the text is what the connectors made of it, for each stream."""
    frames, height, width = work.latent_frames, work.latent_height, work.latent_width
    batch, video, sound = work.batch, frames * height * width, round(work.frames / 24 * 25)
    wide = (config["caption_channels"],) * 2 if config["use_prompt_embeddings"] else (4096, 2048)
    return {
        "hidden_states": (batch, video, 128), "audio_hidden_states": (batch, sound, 128),
        "encoder_hidden_states": (batch, work.text_tokens, wide[0]),
        "audio_encoder_hidden_states": (batch, work.text_tokens, wide[1]), "timestep": ((batch,), F32),
        "sigma": ((batch,), F32), "encoder_attention_mask": ((batch, work.text_tokens), I64),
        "audio_encoder_attention_mask": ((batch, work.text_tokens), I64), "num_frames": frames, "height": height,
        "width": width, "fps": 24.0, "audio_num_frames": sound, "video_coords": ((batch, 3, video, 2), F32),
        "audio_coords": ((batch, 1, sound, 2), F32), "use_cross_timestep": True,
    }  # fmt: skip
