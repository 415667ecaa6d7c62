"""Another scheduler of diffusers in the place of a port's own, with the port's settings."""

from __future__ import annotations

import difflib
from typing import Any

from porter.core.errors import UsageError


def exchanged(scheduler: Any, name: str) -> Any:
    """The scheduler class `name` of diffusers, built from the settings of `scheduler`.

    Raises:
        UsageError: the pipeline has none, diffusers has no such scheduler, or it does not go with these settings.
    """
    import diffusers

    if scheduler is None:
        raise UsageError("this pipeline has no scheduler", expected="a pipeline with one", found=f"--scheduler {name}")
    fitting = sorted({cls.__name__ for cls in scheduler.compatibles} | {type(scheduler).__name__})
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        near = difflib.get_close_matches(name, fitting, n=3)
        raise UsageError(
            f"unknown scheduler {name}", expected=", ".join(fitting) or "a scheduler class of diffusers", found=name,
            hint=f"--scheduler {near[0]}" if near else "leave --scheduler out",
        )  # fmt: skip
    if _flows(found) != _flows(type(scheduler)) and found.__name__ not in fitting:
        raise UsageError(
            f"{name} does not step the way this model was trained", expected=", ".join(fitting), found=name,
            hint="leave --scheduler out",
        )  # fmt: skip
    return found.from_config(scheduler.config)  # type: ignore[attr-defined]


def _flows(cls: type) -> bool:
    """Whether a scheduler is made for flow matching."""
    return cls.__name__.startswith("FlowMatch")
