"""The arbiter: both sides again in float64, and the cast traces that float64 would hide.

`Float64` and `float64` live in `parity.recorder`, which must stay a stand-alone file; they are the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parity.recorder import Float64, float64

__all__ = ["Float64", "cast_disagreement", "float64"]


def cast_disagreement(
    reference: Mapping[str, Sequence[str]], candidate: Mapping[str, Sequence[str]], pairs: Mapping[str, str]
) -> dict[str, str]:
    """Where both sides compute in different dtypes: reference module -> what was found.

    Args:
        reference, candidate: module path -> floating-point dtypes computed inside it (its own operations, in float32).
        pairs: reference module -> candidate module.
    """
    found = {}
    for theirs, ours in pairs.items():
        a, b = _below(reference, theirs), _below(candidate, ours)
        if a and b and a != b:
            found[theirs] = (
                f"{theirs or 'the reference'} computes in {', '.join(sorted(a))}; "
                f"{ours or 'the candidate'} in {', '.join(sorted(b))}"
            )
            if (a ^ b) & {"float16", "bfloat16"}:
                found[theirs] += "; halves=False in a case's Side leaves its casts to half precision out"
    return found


def _below(casts: Mapping[str, Sequence[str]], path: str) -> set[str]:
    """Dtypes computed in a module and everything below it; the root is everything."""
    return {d for p, seen in casts.items() if not path or p == path or p.startswith(path + ".") for d in seen}
