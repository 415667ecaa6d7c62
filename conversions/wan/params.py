"""What diffusers' config.json says of a Wan transformer, and what of it the native model does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from conversions.wan.recipe import NORM
from porter.core.errors import BadInputError


@dataclass(frozen=True)
class WanParams:
    """The fields of diffusers' transformer/config.json."""

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    qk_norm: str
    eps: float
    image_dim: int | None
    added_kv_proj_dim: int | None
    rope_max_seq_len: int
    pos_embed_seq_len: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WanParams:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing, unknown, or asks for what this model does not do.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        given.setdefault("pos_embed_seq_len", None)  # Wan 2.1's configs were written before the field was
        given["out_channels"] = given.get("out_channels") or given.get("in_channels")
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a Wan transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        params = cls(**given | {"patch_size": tuple(given["patch_size"])})
        width = params.num_attention_heads * params.attention_head_dim
        demands = {
            f"qk_norm {NORM}": params.qk_norm == NORM,
            "patch_size of three axes": len(params.patch_size) == 3,
            "an even freq_dim and attention_head_dim": not (params.freq_dim % 2 or params.attention_head_dim % 2),
            f"added_kv_proj_dim {width} (the width) with image_dim, and neither or both":
                params.added_kv_proj_dim == (None if params.image_dim is None else width),
            "pos_embed_seq_len only with image_dim": params.pos_embed_seq_len is None or params.image_dim is not None,
        }  # fmt: skip
        if unmet := [demand for demand, holds in demands.items() if not holds]:
            raise BadInputError(
                "the transformer's config.json describes a Wan that is not supported",
                expected="; ".join(unmet),
                found=", ".join(f"{name} {value!r}" for name, value in given.items()),
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        return params
