"""`--verify`: the written component loaded by its real class, strictly, made again with torch, and undone once.

The one place outside parity and the runtime where a library's class is imported, and only classes of the libraries that
`porter.core.libraries` allows.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from porter.core.checkpoint import BITS, TensorInfo, read_bytes, read_header
from porter.core.errors import BadInputError, CheckFailed
from porter.core.execute import execute
from porter.core.jobs import Job
from porter.core.libraries import LIBRARIES
from porter.core.ops import TORCH_NAMES
from porter.core.staging import Staging

# What decides about the class's tensors, and the account of those that were written.
_HINT = "see `porter recipe check` for the account, and whether config.json is this model's (--config FILE)"


def verify_job(job: Job, staging: Staging) -> dict[str, Any]:
    """Checks one written component against its real class and against its source.

    Returns:
        {"class", "tensors", "bytes", "computed", "round_trip"}: what was compared. `computed` counts the written
        tensors that torch makes of the source, op by op; `round_trip` the source tensors that came back byte for
        byte, or says why the conversion cannot be undone.

    Raises:
        CheckFailed: a tensor is missing, unexpected or different.
        BadInputError: a class that porter does not import.
    """
    header: dict[str, TensorInfo] = {}
    written: dict[str, str] = {}
    for shard in job.shards:
        header |= read_header(staging.path(shard.file))[0]
        written |= staging.files[shard.file]["tensors"]
    loaded = None
    if all(shard.file.startswith(f"{job.component}/") for shard in job.shards):
        loaded = _load(job, staging.path(job.shards[0].file).parent, header, written)
    return {
        "class": loaded,
        "tensors": len(header),
        "bytes": sum(info.nbytes for info in header.values()),
        "computed": _computed(job, header),
        "round_trip": _round_trip(job, header, staging),
    }


def _load(job: Job, folder: Path, header: Any, written: dict[str, str]) -> str:
    """Loads the component with its class; every tensor must be there, none left over, each as it was written."""
    if job.library not in LIBRARIES:
        raise BadInputError(f"{job.component}: porter imports no class of {job.library}", expected=", ".join(LIBRARIES))
    torch = importlib.import_module("torch")
    real = getattr(importlib.import_module(job.library), job.class_name)
    if job.library == "diffusers" and getattr(real, "_keep_in_fp32_modules", None):
        # Says something only where a dtype is asked for, and would need accelerate.
        real = type(job.class_name, (real,), {"_keep_in_fp32_modules": None})
    quiet = {"low_cpu_mem_usage": False} if job.library == "diffusers" else {}  # or it advises to install something
    with _no_bars(job.library):
        module, told = real.from_pretrained(str(folder), output_loading_info=True, local_files_only=True, **quiet)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            raise CheckFailed(
                f"{job.class_name} does not load strictly", found=f"{kind}: {list(told[kind])[:4]}", hint=_HINT
            )
    state = module.state_dict()
    state = _as_written(state, header)
    if odd := set(state) ^ set(header):
        raise CheckFailed(
            f"{job.class_name} and the written file name different tensors", found=str(sorted(odd)[:4]), hint=_HINT
        )
    for name, info in header.items():
        known = TORCH_NAMES.get(info.dtype)
        held = state[name].detach().to(getattr(torch, known)) if known else state[name]
        raw = held.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if hashlib.sha256(raw).hexdigest() != written[name]:
            raise CheckFailed(f"{job.class_name} holds other values than were written", found=name)
    return f"{job.library}.{job.class_name}"


@contextmanager
def _no_bars(library: str) -> Iterator[None]:
    """Without the library's own progress bars, which it prints even where stderr is no terminal."""
    logging = importlib.import_module(f"{library}.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _as_written(state: Any, header: Any) -> Any:
    """A class's tensors by the names in the file, where the class has left out the first part that all of these share.

    transformers 5 does so: its CLIPTextModel reads `text_model.embeddings…` and calls it `embeddings…`.
    """
    heads = {name.partition(".")[0] for name in header}
    if len(heads) == 1 and not any(name.startswith(f"{next(iter(heads))}.") for name in state):
        return {f"{next(iter(heads))}.{name}": tensor for name, tensor in state.items()}
    return state


def _computed(job: Job, written: Mapping[str, TensorInfo]) -> int:
    """Makes every written tensor again with torch's own ops, whole, and compares it; returns how many there are.

    What wrote them followed views and copied bytes: the two share nothing but the recipe.
    """
    torch = importlib.import_module("torch")
    count = 0
    for step in job.plan.steps:
        sources = [job.plan.sources[name] for name in step.sources]
        small = any(BITS[info.dtype] < 8 for info in sources)
        if not step.outputs or (small and step.ops):  # torch has no elements below a byte
            continue
        values = [_tensor(info, torch) for info in sources]
        for op in step.ops:
            values = op.compute(values, torch)
        for item, value in zip(step.outputs, values, strict=True):
            made = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if made != read_bytes(written[item.name]):
                raise CheckFailed(f"{job.component} holds other values than torch makes of its source", found=item.name)
            count += 1
    return count


def _tensor(info: TensorInfo, torch: Any) -> Any:
    """A tensor read from its file; of a dtype that is only moved, as integers of its size."""
    data = bytearray(read_bytes(info))
    if BITS[info.dtype] < 8:
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    known = TORCH_NAMES.get(info.dtype, f"int{BITS[info.dtype]}")
    dtype = getattr(torch, known)
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(info.shape)


def _round_trip(job: Job, written: Mapping[str, TensorInfo], staging: Staging) -> int | str:
    """Undoes the conversion into a temporary file and compares it with the source, tensor by tensor."""
    if job.plan.exactness != "exact":
        return f"not undone: the conversion is {job.plan.exactness}"
    back = job.plan.rebind(written).inverse()
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=staging.folder) as folder:
        restored = Path(folder) / "restored.safetensors"
        execute(back, restored, metadata={}, overwrite=True)
        found, _ = read_header(restored)
        original = job.plan.sources
        if odd := set(found) ^ set(original):
            raise CheckFailed(f"undoing {job.component} names other tensors", found=str(sorted(odd)[:4]))
        for name, info in original.items():
            if read_bytes(found[name]) != read_bytes(info):
                raise CheckFailed(f"undoing {job.component} does not restore {name}")
    return len(found)
