"""A process of a job that ends badly, in the way that its argument says; `porter.cli` shows and codes its error."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import click
import torch
import torch.distributed as dist

from porter import cli
from porter.core.errors import MissingError
from runtime.parallel.mesh import Parallel, Run, start

SIZES = {"sizes": Parallel(tp=4)}  # of the others: two processes


@cli.app.command("end")
@click.argument("how")
def end(how: str) -> None:
    """End as `how` says."""
    print("every process prints this")
    timeout = timedelta(seconds=5 if how == "silent" else 300)
    with start(SIZES.get(how, Parallel(tp=2)), "cpu", timeout=timeout) as run:
        assert run is not None
        print(f"heard from rank {run.rank}")
        print(f"warned by rank {run.rank}", file=sys.stderr)
        dist.barrier()
        WAYS[how](run)


def wait(run: Run) -> None:
    """In a collective that nobody else joins."""
    dist.all_reduce(torch.ones(1))


def killed(run: Run) -> None:
    if run.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait(run)


def killed_elsewhere(run: Run) -> None:
    """The other one is in no collective: only torchrun can tell it."""
    if run.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def raises(run: Run) -> None:
    if run.rank == 1:
        raise MissingError("rank 1 lacks a file", hint="bring it")
    wait(run)


def all_raise(run: Run) -> None:
    raise MissingError("no rank has the file", hint="bring it")


def silent(run: Run) -> None:
    if run.rank == 1:
        time.sleep(300)
    wait(run)


WAYS = {
    "killed": killed,
    "killed elsewhere": killed_elsewhere,
    "raises": raises,
    "all raise": all_raise,
    "silent": silent,
    "sizes": wait,
}

if __name__ == "__main__":
    cli.VerbTable.get_command = lambda self, ctx, name: click.Group.get_command(self, ctx, name)  # type: ignore[method-assign]
    cli.VERBS["end"] = "End badly."
    sys.exit(cli.main(["end", sys.argv[1]]))
