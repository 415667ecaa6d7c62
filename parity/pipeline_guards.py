"""What keeps two pipelines that agree on nothing from passing: pictures, prompts, second requests, files, state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from parity.compare import DIFFERS, IDENTICAL, ROUNDING, Verdict, skipped
from parity.images import emptiness, frames, levels
from parity.schedule import differing
from parity.stages import Run

SECOND = "a second request"
AGAIN = 30.0  # times its noise in the first request that a second one may differ; kept state is far above
EFFECT = 1e-3  # another prompt must change some pixel by more
HALFWAY = 1e-4  # levels: this close to the middle of two, float32 rounds either way
STATE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}  # scaled tolerance of tensors that a scheduler keeps


def check(
    reference: Run, candidate: Run, again: Run, again_here: Run, floors: Mapping[str, float], dtype: str
) -> list[Verdict]:
    """One verdict for each guard.

    Args:
        reference, candidate: both sides' runs as asked.
        again, again_here: both sides' next runs, for another prompt.
        floors: stage -> the reference's own noise in its first run, in the stage's unit.
    """
    found = [_shows("the reference's picture", reference.image)]
    latents = _before_decoding(reference)
    if latents is not None:
        found.append(_shows("the reference's last latents", latents, latent=True))
    found.append(_prompt(reference, candidate, again, again_here))
    found.append(_second(again, again_here, floors))
    if reference.saved is not None and candidate.saved is not None:
        found.append(_saved(reference, candidate))
    if reference.schedule.kind == candidate.schedule.kind:
        found += [_state(n, a, b, dtype) for n, a, b in (("", reference, candidate), (" again", again, again_here))]
    return found


def _holds(name: str, largest: float = 0.0, elements: int = 0, note: str = "") -> Verdict:
    status = ROUNDING if largest else IDENTICAL
    return Verdict(name, status, largest, largest, elements=elements, of=elements, note=note)


def _before_decoding(run: Run) -> Tensor | None:
    """(B, C, h, w) or (B, C, F, h, w): what the decoder gets."""
    given = (t for name, t in run.seen.items() if name.startswith("decoder ") and " -> " not in name)
    return next((t for t in given if t.is_floating_point() and t.ndim >= 4), None)


def _shows(name: str, images: Tensor, latent: bool = False) -> Verdict:
    """Sides that agree on a picture of nothing agree on nothing."""
    name = f"{name} shows something"
    for frame in images if images.ndim > 3 else [images]:
        if why := emptiness(frame, latent=latent):
            return skipped(name, f"{why}: nothing was compared")
    return _holds(name, elements=images.numel())


def _prompt(reference: Run, candidate: Run, again: Run, again_here: Run) -> Verdict:
    name = "another prompt, another picture"
    pairs = {"reference": (reference.image, again.image), "candidate": (candidate.image, again_here.image)}
    gaps = {
        side: math.inf if a.shape != b.shape else float((a.double() - b.double()).abs().max())
        for side, (a, b) in pairs.items()
    }
    deaf = [side for side, gap in gaps.items() if not gap > EFFECT]
    if not deaf:
        return _holds(name, elements=reference.image.numel())
    note = f"the prompt changes nothing in the picture of the {' and the '.join(deaf)}"
    if "reference" in deaf:
        return skipped(name, f"{note}: its part in the pipeline was not compared")
    return Verdict(name, DIFFERS, gaps["candidate"], gaps["candidate"], note=note)


def _second(again: Run, again_here: Run, floors: Mapping[str, float]) -> Verdict:
    """A second request must agree as the first did: state kept from the first shows here."""
    name = SECOND
    largest = 0.0
    stages = again.seen | {"image": again.image}
    ours = again_here.seen | {"image": again_here.image}
    for stage in (n for n in stages if n.endswith("latents") or n == "image" or n.startswith("sigmas")):
        a, b = stages[stage], ours.get(stage)
        if b is None or a.shape != b.shape:
            return skipped(name, f"it has no such {stage} on the candidate's side")
        gap, peak = float((a.double() - b.double()).abs().max()), float(a.double().abs().max())
        floor = floors.get(stage, 0.0)
        allowed = AGAIN * (floor if math.isfinite(floor) else 0.0) + 1e-6 * max(1.0, peak)
        if not gap <= allowed:
            text = f"differs from {stage} on ({gap:.1e}, allowed {allowed:.1e}): something is kept from the first"
            return Verdict(name, DIFFERS, gap, gap, peak=peak, elements=a.numel(), of=a.numel(), note=text)
        largest = max(largest, gap)
    return _holds(name, largest, again.image.numel())


def _saved(reference: Run, candidate: Run) -> Verdict:
    """The files' levels may differ only where the pictures themselves round to other levels."""
    name = "the saved picture"
    assert reference.saved is not None and candidate.saved is not None
    a, b = reference.saved.to(torch.int16), candidate.saved.to(torch.int16)
    if a.shape != b.shape:
        return skipped(name, f"saved as {tuple(b.shape)}, reference {tuple(a.shape)}")
    theirs, ours = (frames(side.image).double() * 255 for side in (reference, candidate))
    between = ((theirs % 1) - 0.5).abs() <= (theirs - ours).abs() + HALFWAY
    known = between | (levels(theirs / 255) != levels(ours / 255))
    gap = (a - b).abs()
    stray = (gap > 0) & ~known
    if not bool(stray.any()):
        largest = float(gap.max()) / 255
        return _holds(name, largest, a.numel(), f"{int((gap > 0).sum())} levels differ" if largest else "")
    count, most = int(stray.sum()), int(gap[stray].max())
    why = "one rounds where the other truncates" if most == 1 else "one is saved by other rules"
    note = f"{count} of {a.numel()} levels differ by up to {most} where the pictures agree: {why}"
    return Verdict(name, DIFFERS, most / 255, most / 255, elements=a.numel(), of=a.numel(), note=note)


def _state(when: str, reference: Run, candidate: Run, dtype: str) -> Verdict:
    """Two schedulers of one class must hold the same, before the first step and after the last."""
    name = f"the scheduler's state{when}"
    held = 0
    for point, theirs in reference.schedule.states.items():
        ours = candidate.schedule.states.get(point)
        if ours is None:
            return skipped(name, f"the candidate's never came to {point!r}")
        if found := differing(theirs, ours, STATE[dtype]):
            return Verdict(name, DIFFERS, note=f"at the {point}: {'; '.join(found[:3])}")
        held += len(theirs.keys() & ours.keys())
    return _holds(name, elements=held)
