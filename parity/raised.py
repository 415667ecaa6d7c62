"""What a model's code raised, and where: stand-alone (the standard library only)."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

_LIBRARY = re.compile(r"/(site|dist)-packages/(torch|einops)/|/lib/python[\d.]+/(?!(site|dist)-packages)")


def told(error: BaseException) -> str:
    """`AssertionError (no message), at wan/modules/attention.py:52: assert dtype in half_dtypes`.

    The place is the last line of the model's own code, not of torch or of this package.
    """
    words = str(error) or "(no message)"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _of_the_model(f.filename)]
    place = ""
    if frames:
        last = frames[-1]
        line = " ".join((last.line or "").split())[:120]
        place = f", at {'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}: {line}"
    return f"{type(error).__name__}: {words}{place}"


def _of_the_model(file: str) -> bool:
    return Path(file).parent != Path(__file__).parent and file[:1] != "<" and not _LIBRARY.search(file)
