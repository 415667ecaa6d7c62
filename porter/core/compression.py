"""How much an autoencoder compresses, from its config alone: pixels and frames per latent position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 10**6  # of any size in a workload or a config; what is larger is a mistake, or meant to hurt
_SPATIAL = ("spatial", "spatiotemporal")
_TEMPORAL = ("temporal", "spatiotemporal")


def compression(config: Mapping[str, Any]) -> tuple[int | None, int]:
    """(pixels per latent position, each way; frames per latent frame) of an autoencoder's full config.

    What the config says outright comes first; then the levels that it says to compress space or time, with patches;
    else each level but the last halves the picture. The first is None where nothing tells.
    """
    spatial = _named(config, "spatial_compression_ratio", "scale_factor_spatial", "ffactor_spatial")
    temporal = _named(config, "temporal_compression_ratio", "scale_factor_temporal", "ffactor_temporal")
    space, time = _levels(config)
    spatial = spatial or space
    if spatial is None and (levels := number(config.get("levels"))):
        spatial = (number(config.get("up_down_scale_factor")) or 2) ** min(levels, 16)
    if spatial is None:
        widths = row(config.get("block_out_channels")) or row(config.get("encoder_block_out_channels"))
        spatial = 2 ** (len(widths) - 1) if widths else None
    halved = row(config.get("temperal_downsample"))  # so spelt; each of them halves the picture too
    spatial = spatial or (2 ** len(halved) if halved else None)
    if temporal is None:
        temporal = time or 2 ** sum(map(bool, halved))
    return (min(spatial, LARGEST) if spatial else None), min(temporal, LARGEST)


def _levels(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Compression of space and of time by the levels that the config lists one by one; None where it does not."""
    patch, patch_t = (number(config.get(key)) or 1 for key in ("patch_size", "patch_size_t"))
    if halved := [bool(each) for each in row(config.get("spatio_temporal_scaling"))]:
        kinds = row(config.get("downsample_type"))[: len(halved)]
        told = len(kinds) == len(halved) and set(kinds) <= {*_SPATIAL, *_TEMPORAL}
        space = sum(on and (not told or kinds[i] in _SPATIAL) for i, on in enumerate(halved))
        time = sum(on and (not told or kinds[i] in _TEMPORAL) for i, on in enumerate(halved))
        return patch * 2**space, patch_t * 2**time
    found: list[int | None] = []
    for space_or_time in ("spatial", "temporal"):
        steps = row(config.get(f"{space_or_time}_expansions")) or row(config.get(f"{space_or_time}_downsample_factors"))
        found.append(math.prod(number(step) or 1 for step in steps) if steps else None)
    blocks = row(config.get("down_block_types"))[:-1]  # the last level compresses nothing
    if (in_time := sum(str(kind).startswith("SpatialTemporal") for kind in blocks)) and found[1] is None:
        found[1] = 2**in_time
    return found[0], found[1]


def _named(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if (value := number(config.get(key)))), None)


def number(value: Any) -> int | None:
    """A whole number of a size that models have, or None. A whole float counts: some configs write 4.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST else None


def row(value: Any) -> tuple[Any, ...]:
    """A short list as a tuple; nothing for all else."""
    return tuple(value) if isinstance(value, list | tuple) and len(value) <= 16 else ()
