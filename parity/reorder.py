"""Steps that go wrong because a conversion put weights into other rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress

from parity.capture import Capture
from parity.makers import maker_of
from parity.mend import moments
from parity.plain import Suspect
from parity.rows import guesses
from parity.steps import Steps

_MOST_GUESSES = 80


def reorder(steps: Steps, alone: Capture, failing: Sequence[str]) -> None:
    """Note in `steps.rows` which steps are right once leaves before them answer in another order.

    Args:
        alone: the candidate in float64, with every leaf alone.
        failing: taps that go wrong, in order.
    """
    right = {key for key in steps.taps if steps.matches(key, alone)}
    order = [m for m in moments(alone) if m.path in steps.leaves and m.where + ".out.0" in alone.tensors]
    left = _MOST_GUESSES
    for key in failing:
        if key in steps.rows or not left:
            continue
        maker, taker = maker_of(steps.trace, key, steps.alignment, steps.candidate, alone)
        call = steps.taps[key].call
        before = itertools.takewhile(lambda m, at=f"{taker}#{call}": m.where != at, order)  # type: ignore[misc]
        inner = [m.where for m in before if m.kind == "out" and maker and m.path.startswith(f"{maker}.")]
        for guess in itertools.islice(guesses(alone, inner), left):
            left -= 1
            with suppress(Exception):  # a model may refuse values that fit nothing around them
                run = steps.run(isolation=steps.isolation.planned({}, guess.answers))
                after = {k for k in steps.taps if steps.matches(k, run)}
                if key in after and right <= after:
                    theirs = dict.fromkeys(b for leaf in guess.leaves for b in steps.alignment.behind(leaf))
                    said = Suspect(", ".join(guess.leaves), ", ".join(theirs), rows=guess.words)
                    steps.rows |= dict.fromkeys((k for k in failing if k in after), said)
                    break
