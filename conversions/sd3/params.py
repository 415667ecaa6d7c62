"""What config.json says of a Stable Diffusion 3 transformer, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from porter.core.errors import BadInputError

# Fields that came with 3.5, at what a config.json without them means.
BEFORE_35: Mapping[str, Any] = {"dual_attention_layers": (), "qk_norm": None}


@dataclass(frozen=True)
class SD3Params:
    """The fields of diffusers' transformer/config.json."""

    sample_size: int  # latent side the model is best at; only a default for requests
    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...]
    qk_norm: str | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SD3Params:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing, unknown, not supported, or contradicts another.
        """
        given = {**BEFORE_35, **{key: value for key, value in config.items() if not key.startswith("_")}}
        given["out_channels"] = given.get("out_channels") or given.get("in_channels")
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a Stable Diffusion 3 transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        for name in sorted(names - BEFORE_35.keys()):
            # Without a largest side diffusers computes the positions; no released model does.
            _demand(name, given[name], _whole(given[name], 1), "a whole number from 1")
        width, count = given["num_attention_heads"] * given["attention_head_dim"], given["num_layers"]
        _demand("caption_projection_dim", given["caption_projection_dim"], given["caption_projection_dim"] == width,
                f"the model's width, {width}")  # fmt: skip
        _demand("qk_norm", given["qk_norm"], given["qk_norm"] in (None, "rms_norm"), "null or rms_norm")
        dual = given["dual_attention_layers"]
        blocks = isinstance(dual, list | tuple) and all(_whole(i, 0) and i < count for i in dual)
        _demand("dual_attention_layers", dual, blocks, f"numbers of blocks, 0 to {count - 1}")
        return cls(**given | {"dual_attention_layers": tuple(dual)})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def _whole(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _demand(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise BadInputError(
            f"the transformer's config.json has a {name} that the native model cannot run",
            expected=f"{name}: {expected}",
            found=f"{name}: {value!r}"[:120],
            hint="run the port with diffusers' own classes: porter generate <port> --executor diffusers",
        )
