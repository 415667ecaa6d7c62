"""LoRA files: which model their factors are for, told by the names of the tensors that they change."""

from __future__ import annotations

import re
from collections.abc import Iterable

from porter.core.architectures import Architecture, architectures, template
from porter.core.companions import FACTORS

FITS = 0.9  # share of the changed names that a model must have
_WRITERS = ("", "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "base_model.model.", "model.")
_FLAT = re.compile(r"^lora_(unet|te\d?|transformer)_")
_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")


def adapted(names: Iterable[str]) -> tuple[list[Architecture], float]:
    """The architectures whose tensors a LoRA's factors change, and the share of those tensors that they have.

    Several where the names fit several alike (at most one a family), those of most released models first; none where
    no architecture has nine names in ten.
    """
    changed = {FACTORS.sub("", name) for name in names if FACTORS.search(name)}
    flat = {_NUMBER.sub("{}", _FLAT.sub("", name)) for name in changed if _FLAT.match(name)}
    dotted = {template(name) for name in changed if not _FLAT.match(name)}
    joined = len(flat) > len(dotted)
    # A file may change text encoders too: the denoiser's names are the most of it.
    cuts = [flat] if joined else [{n.removeprefix(p) for n in dotted if n.startswith(p)} for p in _WRITERS]
    cuts = [cut for cut in cuts if 2 * len(cut) > len(flat if joined else dotted)]
    shares: dict[int, float] = {}
    for number, known in enumerate(architectures()):
        theirs = {name.removesuffix(".weight") for name in known.templates if name.endswith(".weight")}
        theirs = {name.replace(".", "_") for name in theirs} if joined else theirs
        shares[number] = max((len(cut & theirs) / len(cut) for cut in cuts), default=0.0)
    best = max(shares.values())
    if best < FITS:
        return [], 0.0
    found = [architectures()[number] for number, share in shares.items() if share == best]
    found.sort(key=lambda known: -len(known.variants))
    return list({known.family: known for known in reversed(found)}.values())[::-1], best
