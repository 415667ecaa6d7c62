"""What can be said before anything runs: weights on their way, dtypes, settings, and parameters that hide faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.align import Alignment
from parity.influence import Moved
from parity.recorder import attributes

# Settings under the names that projects give them; a width or a number of features shows in the weights already.
_ALIKE = (
    ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps"),
    ("num_heads", "heads", "n_heads", "nhead", "num_attention_heads", "n_head"),
    ("head_dim", "dim_head", "attention_head_dim", "dim_head_attn"),
    ("theta", "rope_theta", "base"),
    ("num_groups", "n_groups"),
    ("scale", "softmax_scale", "scaling"),
    ("approximate",), ("downscale_freq_shift",), ("flip_sin_to_cos",), ("max_period",), ("causal", "is_causal"),
    ("negative_slope",), ("ceil_mode",), ("padding_mode",), ("scale_factor",), ("rescale_output_factor",),
)  # fmt: skip
_NAMES = {name: kind[0] for kind in _ALIKE for name in kind}


def differing_settings(
    reference: Mapping[str, Mapping[str, Any]], module: nn.Module, alignment: Alignment
) -> dict[str, str]:
    """Settings that both live modules have and that differ: reference module -> `eps 1e-06 here, 1e-05 there`."""
    own = attributes(module)
    found: dict[str, str] = {}
    for path, theirs in reference.items():
        if not path or not alignment.leaves(path):
            continue
        ours = alignment.counterpart(path)
        if not ours or ours not in own or set(alignment.behind(ours)) != set(alignment.leaves(path)):
            continue
        if text := pair_settings(theirs, own[ours]):
            found[path] = text
    return found


def pair_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Settings of two modules that differ: `eps 1e-06 in the reference, 1e-05 in the candidate`; empty for none."""
    return "; ".join(
        f"{name} {a!r} in the reference, {b!r} in the candidate"
        for name, a, b in _pairs(theirs, ours)
        if type(a) in (bool, str) or type(b) in (bool, str) or not _close(a, b)
        if a != b
    )


def _pairs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    known = {_NAMES[name]: value for name, value in ours.items() if name in _NAMES}
    return [(n, v, known[_NAMES[n]]) for n, v in theirs.items() if n in _NAMES and _NAMES[n] in known]


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def constant_tensors(module: nn.Module) -> list[str]:
    """A warning where parameters are still all zero or all one: a comparison through them proves little."""
    found = []
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        if len(values) > 1 and values[0].item() in (0, 1) and bool((values == values[0]).all()):
            found.append(name)
    shown = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
    return [f"{len(found)} parameters are all zero or all one, so faults in them stay hidden: {shown}"] if found else []


def round_trip(moves: Iterable[Moved], state: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> list[str]:
    """What of the weights does not arrive as it was: rows left behind, values changed. Empty where a way back exists.

    Args:
        moves: of `parity.fingerprint.moved`; they say where each row went.
        state, converted: before and after.
    """
    moves = list(moves)
    left: dict[str, int] = {}
    changed: dict[str, float] = {}
    for name in dict.fromkeys(move.source for move in moves):
        count = len(state[name]) if state[name].ndim else 1
        arrived = torch.zeros(count, dtype=torch.bool)
        for move in (m for m in moves if m.source == name):
            arrived[slice(*(move.source_rows or (0, count)))] = True
        if not bool(arrived.all()):
            left[name] = int((~arrived).sum())
    for move in moves:
        before, after = _part(state[move.source], move.source_rows), _part(converted[move.target], move.target_rows)
        if before.numel() != after.numel():  # one of several that a tensor was put together from
            continue
        # Within a row axes may change places, so that only the set of values is the same.
        gap = float((before.reshape(-1).double().sort()[0] - after.reshape(-1).double().sort()[0]).abs().max())
        if gap > 0 and before.is_floating_point():
            changed[move.target] = max(gap, changed.get(move.target, 0.0))
    found = []
    if left:
        shown = ", ".join(f"{count} rows of {name}" for name, count in list(left.items())[:3])
        found.append(f"the conversion leaves behind {shown}{' …' if len(left) > 3 else ''}")
    if changed:
        shown = ", ".join(f"{name} (by {gap:.1e})" for name, gap in list(changed.items())[:3])
        found.append(f"the conversion changes the values of {len(changed)} tensors: {shown}")
    return found


def _part(tensor: Tensor, rows: tuple[int, int] | None) -> Tensor:
    part = tensor if rows is None else tensor[slice(*rows)]
    return torch.view_as_real(part.resolve_conj()) if part.is_complex() else part


def differing_dtypes(reference: Mapping[str, int], candidate: Mapping[str, int]) -> list[str]:
    """A note where one side builds weights in a dtype that the other does not use; both are compared in float32."""
    if set(reference) == set(candidate) or not reference:
        return []
    sides = (
        f"the {whose} {', '.join(f'{count} in {kind}' for kind, count in sorted(found.items()))}"
        for whose, found in (("reference", reference), ("candidate", candidate))
    )
    return [f"built in other dtypes: {'; '.join(sides)}"]
