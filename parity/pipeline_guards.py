"""What keeps two pipelines that agree on nothing from passing: pictures, prompts, second requests, files, state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.compare import DIFFERS, IDENTICAL, PRECISION, ROUNDING, Verdict, skipped
from parity.draws import compare_draws
from parity.images import emptiness, frames, levels
from parity.pipeline_judge import OWN_WAY, Runs, base
from parity.schedule import differing
from parity.stages import Request, Run, Stopped

SECOND, BATCH = "a second request", "a batch of another size"
AGAIN = 30.0  # times its noise in the first request that a second one may differ; kept state is far above
EFFECT = 1e-3  # another prompt must change some pixel by more
HALFWAY = 1e-4  # levels: this close to the middle of two, float32 rounds either way
STATE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}  # scaled tolerance of tensors that a scheduler keeps
LEAST = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}  # scaled difference that counts as none in any stage


@dataclass(frozen=True)
class Apart:
    """Where two runs for the same request part first, and by how much at the stage where numbers do."""

    where: str
    gap: float = math.nan
    peak: float = math.nan
    why: str = ""


def check(theirs: Runs, ours: Runs, batch: Request, dtype: str) -> list[Verdict]:
    """One verdict for each guard; `batch` is what both sides' third runs were asked for."""
    reference, candidate = theirs.first, ours.first
    found = [_shows("the reference's picture", reference.image)]
    latents = _before_decoding(reference)
    if latents is not None:
        found.append(_shows("the reference's last latents", latents, latent=True))
    pairs = [(reference, candidate)]
    for name, a, b in ((SECOND, theirs.second, ours.second), (BATCH, theirs.third, ours.third)):
        if isinstance(a, Stopped):
            found.append(skipped(name, f"the reference's ended in {a}"))
        elif isinstance(b, Stopped):
            found.append(skipped(name, f"the candidate's ended in {b}{until_then(theirs, a, b, dtype)}"))
        elif name == SECOND:
            pairs.append((a, b))
            found.append(_prompt(reference, candidate, a, b))
            found.append(_agree(name, theirs, a, b, dtype, "something is kept from the first"))
        else:
            found.append(_batch(theirs, a, b, batch, dtype))
    if reference.saved is not None and candidate.saved is not None:
        found.append(_saved(reference, candidate))
    if reference.schedule.kind == candidate.schedule.kind:
        found += [_state(when, *pair, dtype) for when, pair in zip(("", " again"), pairs, strict=False)]
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


def _floors(reference: Runs) -> dict[str, float]:
    """Kind of stage -> the largest noise of the reference's own first run in it, in the stage's unit."""
    found: dict[str, float] = {}
    exact = reference.truth.seen | {"image": reference.truth.image} if reference.truth else {}
    for stage, low in (reference.first.seen | {"image": reference.first.image}).items():
        high = exact.get(stage)
        if high is not None and high.shape == low.shape and low.numel():
            noise = float((low.double() - high.double()).abs().max())
            found[base(stage)] = max(found.get(base(stage), 0.0), noise if math.isfinite(noise) else 0.0)
    return found


def apart(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], floors: Mapping[str, float], dtype: str
) -> Apart | None:
    """Where two runs for the same request part first; None where no stage of the reference's differs.

    Differences count above `AGAIN` times the reference's own noise in that kind of stage.
    """
    first = None
    for stage, a in theirs.items():
        b = ours.get(stage)
        if b is None or a.shape != b.shape:
            if not stage.startswith((OWN_WAY, "draw ")):
                seen = "is never seen" if b is None else f"has the shape {tuple(b.shape)}, reference {tuple(a.shape)}"
                first = first or Apart(stage, why=f"{stage} {seen} on the candidate's side")
            continue
        x, y = a.double(), b.double()
        same = (x == y) | (x.isnan() & y.isnan())
        gap, peak = float((x - y).abs()[~same].max()) if not bool(same.all()) else 0.0, float(x.abs().max())
        allowed = AGAIN * floors.get(base(stage), 0.0) + LEAST[dtype] * max(1.0, peak)
        if not gap <= allowed:
            text = f"differs from {stage} on ({gap:.1e}, allowed {allowed:.1e})"
            return Apart((first or Apart(stage)).where, gap, peak, f"{first.why}, and {text}" if first else text)
    return first


def until_then(reference: Runs, a: Run, stopped: Stopped, dtype: str) -> str:
    """What a candidate that stopped half way had differently from the reference's run `a` until then."""
    found = apart({n: t for n, t in a.seen.items() if n in stopped.seen}, stopped.seen, _floors(reference), dtype)
    return f"; before that, it {found.why}" if found else "; until then it agreed with the reference"


def _agree(name: str, reference: Runs, a: Run, b: Run, dtype: str, why: str) -> Verdict:
    """A further request must agree as the first did."""
    draws = compare_draws(a.draws, b.draws, getattr(torch, dtype))
    first = next((v for v in draws.values() if not v.passed), None)
    theirs = {n: t for n, t in a.seen.items() if not n.startswith("draw ")} | {"image": a.image}
    found = apart(theirs, b.seen | {"image": b.image}, _floors(reference), dtype)
    if found is None and first is None:
        gap = float((a.image.double() - b.image.double()).abs().max())
        return _holds(name, gap, a.image.numel())
    notes = [f"{first.name}: {first.note}"] if first else []
    notes += [found.why] if found else []
    text = f"{'; '.join(notes)}: {why}"
    if found is None or math.isnan(found.peak):
        return skipped(name, text)
    status = DIFFERS if dtype == "float32" or not math.isfinite(found.gap) else PRECISION
    return Verdict(name, status, found.gap, found.gap, peak=found.peak, note=text)


def _batch(reference: Runs, a: Run, b: Run, asked: Request, dtype: str) -> Verdict:
    """Several prompts and a size that is not square show what one square picture hides: orders of axes and rows."""
    count, size = len(a.image), tuple(a.image.shape[-2:])
    if count != len(asked.prompts) or size == tuple(reference.first.image.shape[-2:]):
        made = f"{count} of {size[0]} x {size[1]}"
        return skipped(BATCH, f"asked for {len(asked.prompts)} pictures of another size, the reference made {made}")
    what = f"{count} prompts, {size[0]} x {size[1]}" + (", a negative prompt" if asked.negative else "")
    return _agree(BATCH, reference, a, b, dtype, f"asked for {what}")


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
