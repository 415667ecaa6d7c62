"""What may be asked of memory: how much is offloaded, and how the denoiser's weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from porter.core.errors import MissingError, UsageError
from runtime.quality import Quality

Offload = Literal["none", "component", "layer"]
OFFLOADS = ("none", "component", "layer")
_GGUF = "gguf:"


@dataclass(frozen=True)
class Memory:
    """How modules are loaded.

    Attributes:
        offload: what is on the device: everything, the component in use, or of that one's repeated blocks two.
        fp8: whether the large weights of denoisers are stored in 8 bits.
        gguf: a file with the denoiser's weights.
    """

    offload: Offload = "none"
    fp8: bool = False
    gguf: Path | None = None

    @property
    def quantised(self) -> bool:
        """Whether the denoiser's weights are others than those that are stored."""
        return self.fp8 or self.gguf is not None


EVERYTHING = Memory()  # on the device, as stored


def told(weights: str | None) -> str | None:
    """What metadata says of the weights: a file by its name, not its folder."""
    return _GGUF + Path(weights.removeprefix(_GGUF)).name if weights and weights.startswith(_GGUF) else weights


def read_memory(offload: str, weights: str | None, quality: Quality) -> Memory:
    """What is asked for, checked.

    Raises:
        UsageError: words that mean nothing, or other weights at a quality that promises the stored ones.
        MissingError: no such GGUF file.
    """
    if offload not in OFFLOADS:
        raise UsageError(f"no offload {offload}", expected=" | ".join(OFFLOADS), found=offload)
    if weights is None:
        return Memory(offload)  # type: ignore[arg-type]
    if weights != "fp8" and not weights.startswith(_GGUF):
        raise UsageError(f"no weights {weights}", expected="fp8 | gguf:FILE", found=weights)
    if quality != "lossy":
        raise UsageError(
            f"--weights {weights} rounds the weights, and quality {quality} promises the stored ones",
            expected="--quality lossy", found=f"--quality {quality}", hint=f"--weights {weights} --quality lossy",
        )  # fmt: skip
    gguf = Path(weights.removeprefix(_GGUF)) if weights != "fp8" else None
    if gguf is not None and not gguf.is_file():
        raise MissingError(f"no such file: {gguf}", expected="a GGUF file", hint="--weights gguf:FILE")
    return Memory(offload, weights == "fp8", gguf)  # type: ignore[arg-type]
