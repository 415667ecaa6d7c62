"""One run of one side of a pipeline, seen from outside: draws, schedule, what every stage receives and returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import PipelineSide
from parity.draws import Drawn, watch_draws
from parity.recorder import bind, float64, tensors_of
from parity.schedule import Schedule, Watcher, numbers_of

DENOISER = "denoiser"


@dataclass(frozen=True)
class Request:
    """What both sides are asked for.

    Attributes:
        more: further prompts; picture i is drawn from a generator of its own, with seed + i.
        negative: a negative prompt and the scale of its guidance; None asks for none.
        part: height and width, as parts of the model's own.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    more: tuple[str, ...] = ()
    negative: tuple[str, float] | None = None
    part: tuple[float, float] = (1.0, 1.0)

    @property
    def prompts(self) -> list[str]:
        """All prompts, one for each picture."""
        return [self.prompt, *self.more]


@dataclass
class Run:
    """What was seen, in order: stage -> tensor (on the CPU).

    Attributes:
        draws: every request for random numbers.
        image: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1].
        saved: the levels that the side's own code would write to a file, uint8 (frames, 3, H, W).
    """

    image: Tensor
    seen: dict[str, Tensor]
    draws: list[Drawn]
    schedule: Schedule
    saved: Tensor | None = None


class Stopped(Exception):
    """A side raised: `__cause__`, and what was seen until then."""

    def __init__(self, error: BaseException, seen: dict[str, Tensor]) -> None:
        super().__init__(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        self.seen = seen


@dataclass
class _Sink:
    """Keeps tensors by name; what equals the same input of the step before is kept once."""

    seen: dict[str, Tensor] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, tensor: Tensor, alias: str = "") -> None:
        value = tensor.detach().to("cpu", copy=True)
        before = self._last.get(alias)
        if before is not None and before.dtype == value.dtype and torch.equal(before, value):
            value = before
        self._last |= {alias: value} if alias else {}
        self.seen[name] = value


@torch.no_grad()
def run_side(
    side: PipelineSide,
    request: Request,
    *,
    double: bool = False,
    steps: bool = True,
    replay: Sequence[Drawn] | None = None,
) -> Run:
    """Run a loaded side once.

    Args:
        double: in float64, under the arbiter.
        steps: keep every denoiser call and every step; otherwise the stages around the loop only.
        replay: draws of another run of the same side, whose numbers this one gets.

    Raises:
        Stopped: the side raised anything but a lack of memory.
    """
    sink = _Sink()
    watcher = Watcher(side.scheduler, sink, steps)
    with ExitStack() as stack:
        if double:
            stack.enter_context(float64(*side.weights))
        draws = stack.enter_context(watch_draws(request.seed, lambda i, values: sink(f"draw {i}", values), replay))
        for name, module in side.stages.items():
            stack.enter_context(_watch(name, module, sink, watcher, steps))
        schedule = stack.enter_context(watcher.watching())
        try:
            image = side.run(request).detach().cpu().clone()
            saved = side.save(image) if side.save is not None and not double else None
        except MemoryError:
            raise
        except Exception as error:
            raise Stopped(error, sink.seen) from error
    return Run(image, sink.seen, draws, schedule, saved)


@contextmanager
def _watch(name: str, module: nn.Module, sink: _Sink, watcher: Watcher, steps: bool) -> Iterator[None]:
    """Keep what a stage's module receives and returns; a denoiser's calls carry the number of their step.

    Numbers among its arguments count as tensors. Further calls (of a denoiser: in one step) are `encoder#1` …
    """
    looped = name.startswith(DENOISER)
    calls: dict[int, int] = {}

    def label(what: str) -> str:
        at = watcher.result.steps if looped else 0
        again = calls[at]
        return f"{f'step {at} ' if looped else ''}{name}{f'#{again}' if again else ''} {what}"

    def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if looped:
            watcher.before_model()
        at = watcher.result.steps if looped else 0
        calls[at] = calls.get(at, -1) + 1
        given = bind(m, args, kwargs)
        given = {k: n if (n := _number(v)) is not None else v for k, v in given.items()}
        for key, tensor in tensors_of(given, integers=True):
            keep(key, tensor)

    def leave(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        for key, tensor in tensors_of(out, integers=True):
            keep(f"-> {key}", tensor)

    def keep(what: str, tensor: Tensor) -> None:
        if steps or not looped:
            sink(label(what), tensor, f"{name} {what}" if looped else "")

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _number(value: Any) -> Tensor | None:
    return numbers_of(value) if isinstance(value, (int, float)) else None
