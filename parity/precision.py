"""Low precision: each side's error to the truth, never one side against the other."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.compare import DIFFERS, IDENTICAL, PRECISION, ROUNDING, Verdict, loses_no_more


def judge_low(name: str, truth: Tensor, reference: Tensor, candidate: Tensor) -> Verdict:
    """Compare both sides' runs in low precision with the truth, all of one shape.

    `loses_no_more` decides, as for modules. Whole numbers must be equal.

    Args:
        truth: the reference's float64 run (float32 where float64 cannot run).
        reference, candidate: the same stage in the low precision.
    """
    t, r, c = (x.detach().double().reshape(-1) for x in (truth, reference, candidate))
    finite = all(bool(torch.isfinite(x).all()) for x in (t, r, c))
    gap = (r - c).abs()
    theirs, ours = _rms(r - t), _rms(c - t)
    note = f"error to the truth {ours:.1e}, the reference's own {theirs:.1e} (root mean square)"
    if not finite:
        counts = {"truth": t, "reference": r, "candidate": c}
        bad = {n: int((~x.isfinite()).sum()) for n, x in counts.items()}
        lacking = [f"{n} ({count} values)" for n, count in bad.items() if count]
        status, note = DIFFERS, f"NaN or inf in the {' and the '.join(lacking)}"
    elif float(gap.max()) == 0:
        status = IDENTICAL
    elif not reference.is_floating_point():
        status, note = DIFFERS, f"{int((gap > 0).sum())} of {gap.numel()} whole numbers differ"
    else:
        losses = [(float((x - t).abs().max()), rms) for x, rms in ((c, ours), (r, theirs))]
        fits = loses_no_more(losses[0], losses[1], t, reference.dtype)
        status = ROUNDING if fits else PRECISION
    if reference.dtype != candidate.dtype:
        note += f"; {reference.dtype} there, {candidate.dtype} here".replace("torch.", "")
    norms = float(r.norm() * c.norm())
    return Verdict(
        name,
        status,
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        noise_reference=float((r - t).abs().max()),
        noise_candidate=float((c - t).abs().max()),
        peak=float(t.abs().max()),
        cosine=float(r @ c) / norms if norms else float(bool(gap.max() == 0)),
        elements=r.numel(),
        of=r.numel(),
        worst=tuple(int(i) for i in torch.unravel_index(gap.argmax(), truth.shape)),
        note=note,
    )


def _rms(x: Tensor) -> float:
    return float((x**2).mean().sqrt())
