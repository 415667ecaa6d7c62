"""Several processes for one picture: what is asked for, and the mesh that torchrun's processes form.

    settings = Parallel(tp=2, ulysses=2)
    with start(settings) as run:      # None: one process
        pipeline = load(port, device=run.device if run else None)

Every process runs the same program on the same request. Within the body the loader gives each its part of the weights,
`guidance.predict` shares passes and tokens, and only rank 0 is heard.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from porter.core.errors import ResourceError, UsageError
from runtime.parallel.ending import one_voice

DIMS = ("cfg", "ring", "ulysses", "tp")  # the last are neighbours: they exchange the most
TIMEOUT = timedelta(minutes=10)  # how long a process waits for another one
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Keys of a transformer's config.json that count attention heads.
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_heads", "n_kv_heads")
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """How many processes share one picture, and what they share.

    Attributes:
        tp: ranks that share the weights of each layer.
        ulysses: ranks that share the tokens, and in attention the heads.
        ring: ranks that share the tokens, and in attention pass keys and values around.
        cfg: 2: the prompt and the negative prompt run side by side.
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for name in DIMS:
            value = getattr(self, name)
            if type(value) is not int or value < 1 or (name == "cfg" and value > 2):
                expected = "1 or 2" if name == "cfg" else "a number from 1"
                raise UsageError(f"{name} cannot be {value!r}", expected=expected, hint="porter generate --help")

    @property
    def processes(self) -> int:
        """How many processes the sizes make."""
        return self.tp * self.ulysses * self.ring * self.cfg

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in DIMS if getattr(self, name) > 1) or "one process"

    def check_processes(self, started: int) -> None:
        """Whether torchrun started as many processes as the sizes make. Raises UsageError."""
        if started != self.processes:
            raise UsageError(
                f"torchrun started {started} processes, and the sizes make {self.processes}",
                expected=f"tp x ulysses x ring x cfg = {started}",
                found=" x ".join(f"{name} {getattr(self, name)}" for name in reversed(DIMS)),
                hint=_command(self.processes),
            )  # fmt: skip

    def check_heads(self, config: Mapping[str, Any]) -> None:
        """Whether the heads of the transformer with this config.json can be shared; before weights are read.

        Raises:
            UsageError: they cannot, or the config does not count them.
        """
        ranks = self.tp * self.ulysses
        counts = {key: config[key] for key in _HEADS if isinstance(config.get(key), int)}
        if ranks > 1 and not counts:
            raise UsageError(
                "the transformer's config.json does not say how many attention heads it has",
                expected=" or ".join(_HEADS), found=", ".join(map(str, config)) or "nothing",
                hint="share the tokens with --ring alone",
            )  # fmt: skip
        for key, heads in counts.items():
            if heads % ranks:
                fitting = [n for n in range(1, heads + 1) if all(each % n == 0 for each in counts.values())]
                raise UsageError(
                    f"{heads} attention heads ({key}) cannot be shared by {ranks} ranks",
                    expected=f"tp x ulysses of {', '.join(map(str, fitting))}",
                    found=f"tp {self.tp} x ulysses {self.ulysses}",
                    hint="choose other sizes; --ring takes any number of heads",
                )  # fmt: skip

    def check_guidance(self, guided: bool) -> None:
        """Whether there are two passes to run side by side. Raises UsageError."""
        if self.cfg > 1 and not guided:
            raise UsageError(
                "CFG parallel needs classifier-free guidance, and this request has none",
                expected="a negative prompt, and a guidance scale above 1", found="one pass a step",
                hint="leave out --cfg-parallel, or ask for guidance",
            )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """This process in a job of several."""

    settings: Parallel
    mesh: DeviceMesh
    rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def size(self, dim: str) -> int:
        """How many ranks share `dim`."""
        return int(getattr(self.settings, dim))

    def index(self, dim: str) -> int:
        """Which of them this process is."""
        return self.mesh.get_local_rank(dim)

    def group(self, dim: str) -> dist.ProcessGroup:
        """The processes that differ from this one in `dim` alone."""
        return self.mesh.get_group(dim)

    def all(self, x: Tensor, dim: str) -> list[Tensor]:
        """`x` of each rank of `group(dim)`, in order; all of one shape."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size(dim))]
        dist.all_gather(found, x.contiguous(), group=self.group(dim))
        return found

    def share(self, value: T) -> T:
        """Rank 0's `value`, in every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


_current: Run | None = None
_number = count()


def current() -> Run | None:
    """The job that this process is part of, or None."""
    return _current


@contextmanager
def start(settings: Parallel, device: str | None = None, *, timeout: timedelta = TIMEOUT) -> Iterator[Run | None]:
    """Join the job that torchrun started, for the body; None for a single process.

    Args:
        device: cpu or cuda, where each process takes the GPU of its number; None: CUDA where there is one.
        timeout: how long a process waits for another one before it gives up.

    Raises:
        UsageError: sizes that do not fit torchrun's processes, or no torchrun.
        ResourceError: another process died, or does not answer.
        SystemExit: another process failed, and has said why.
    """
    global _current
    place = _place(settings)
    if place is None or place.world == 1:
        settings.check_processes(1)
        yield None
        return
    # A second job of the same processes must not find the first one's addresses.
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"porter {next(_number)}", _store(timeout)
    )
    with one_voice(store, place.rank):
        settings.check_processes(place.world)
        where = _device(device, place.local)
        backend, bound = ("nccl", where) if where.type == "cuda" else ("gloo", None)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout, device_id=bound
        )
        _current = Run(settings, _mesh(settings, where, timeout), place.rank, where)
        try:
            yield _current
        finally:
            _current = None
        dist.destroy_process_group()  # not after an error: it could wait for a dead process


def _mesh(settings: Parallel, device: torch.device, timeout: timedelta) -> DeviceMesh:
    """One group for each dim. torch's `init_device_mesh` gives them no timeout of ours."""
    ranks = torch.arange(settings.processes).reshape([getattr(settings, name) for name in DIMS])
    groups = []
    for dim in range(len(DIMS)):
        rows = ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim]).tolist()
        group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
        assert group is not None  # every rank stands in one row
        groups.append(group)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=DIMS)


class _Place(NamedTuple):
    rank: int
    world: int
    local: int


def _place(settings: Parallel) -> _Place | None:
    """This process among torchrun's; None for a single process without it.

    Raises:
        UsageError: there is no torchrun, and the sizes need it; or its variables are no numbers.
    """
    given = {name: os.environ.get(name) for name in _VARIABLES}
    missing = [name for name, value in given.items() if value is None]
    if missing and settings.processes == 1:
        return None
    if missing:
        raise UsageError(
            f"{settings} needs {settings.processes} processes, which torchrun starts",
            expected=", ".join(_VARIABLES) + " in the environment", found=f"no {', '.join(missing)}",
            hint=_command(settings.processes),
        )  # fmt: skip
    try:
        return _Place(*(int(given[name] or "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError:
        raise UsageError(
            "the environment does not name this process's place", expected="numbers, as torchrun sets them",
            found=", ".join(f"{name}={value!r}" for name, value in given.items()), hint=_command(settings.processes),
        ) from None  # fmt: skip


def _command(processes: int) -> str:
    """The command as it was given, under torchrun where it takes several processes."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    program = Path(sys.argv[0])
    if program.name == "porter" or program.parts[-2:] == ("porter", "cli.py"):
        words = ["-m", "porter.cli", *sys.argv[1:]]
    given = shlex.join(words) if words and (words[0] == "-m" or not words[0].startswith("-")) else "<script>"
    return f"torchrun --nproc-per-node {processes} {given}" if processes > 1 else f"python {given}"


def _device(name: str | None, local: int) -> torch.device:
    """This process's device. Raises UsageError for one that torchrun's processes cannot share out."""
    if name not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {name} names one device for all processes", expected="cpu or cuda", found=name,
            hint="--device cuda: each process takes the GPU of its number",
        )  # fmt: skip
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if local >= there:
        raise UsageError(
            f"there is no GPU for process {local} of this machine", expected="a GPU for each process",
            found=f"{there} GPUs", hint="start fewer processes, or --device cpu",
        )  # fmt: skip
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@cache
def _store(timeout: timedelta) -> Any:
    """The job's key-value store, in the launcher or in rank 0.

    Raises:
        ResourceError: it cannot be reached.
    """
    try:
        store: Any = next(iter(rendezvous("env://", timeout=timeout)))[0]
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ResourceError(
            f"the other processes cannot be reached at {place}", found=str(error).splitlines()[0],
            hint="start all processes with one torchrun",
        ) from error  # fmt: skip
    return store
