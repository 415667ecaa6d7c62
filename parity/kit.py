"""The recorder written out, to be run where porter is not."""

from __future__ import annotations

import shutil
from pathlib import Path

from parity.casename import split_case
from parity.foreign import LAUNCHER, write_kit
from porter.core.errors import MissingError, ResourceError, UsageError

README = """# Recording a reference

These files record what a model computes, in float32 and in float64. They need Python 3.9 or newer with torch,
safetensors and numpy, and nothing else. Nothing here writes to the reference's checkout.

A case (a file with the two sides of a comparison):

    PYTHONDONTWRITEBYTECODE=1 python record.py parity.reference {case} --reference-repo CHECKOUT -o trace.safetensors

`--shims` makes flash_attn, xformers, apex and timm importable on the CPU, with the same arithmetic; the trace says
which were called. A module without a case (`build()` in mine.py returns it, with its weights):

    python record.py parity.recorder --module mine.py:build --inputs inputs.safetensors --source weights.safetensors \\
        --watch 'blocks\\.\\d+' -o trace.safetensors

`--watch` is a regular expression for modules; `@1000` at its end stores a sample of 1000 elements of each tensor.

Take the trace back, and compare it where porter is:

    porter parity compare trace.safetensors other.safetensors
"""


def write_out(folder: Path, case_name: str | None) -> list[str]:
    """Write the recorder, and the case if one is named, into a new or empty folder -> its files' names.

    Raises:
        UsageError: the folder has something in it.
        MissingError: no such case file.
        ResourceError: it cannot be written.
    """
    case = None
    if case_name is not None:
        case, name = split_case(case_name)
        if not case.is_file():
            raise MissingError(f"no such case file: {case}", hint="porter parity record CASE.py --write DIR")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", expected="a new folder", hint="another --write DIR")
    try:
        write_kit(folder)
        launcher = LAUNCHER.replace("import runpy, sys\n", f"import runpy, sys\n{_PATH}")
        (folder / "record.py").write_text(launcher, encoding="utf-8")
        text = README.format(case=f"{case.name}:{name}".rstrip(":") if case else "CASE.py")
        (folder / "README.md").write_text(text, encoding="utf-8")
        if case is not None:
            shutil.copyfile(case, folder / case.name)
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror}", hint="another --write DIR") from error
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# sys.path[0] is the kit's folder already; a case may want what lies in the working folder.
_PATH = 'sys.path.append("")\n'
