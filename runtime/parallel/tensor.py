"""Tensor parallelism: ranks share the weights of layers, by torch's DTensor and as the on-load recipe's rules say.

A `Linear` whose rule has `shard=OUTPUTS` becomes column-parallel (each rank computes its outputs), with `INPUTS`
row-parallel (each rank takes its inputs, the sums are added up, the bias once). An RMSNorm over all heads that a rule
shares sums its squares over the ranks. The loader fills every part straight from the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from porter.core.errors import RecipeError, UsageError
from porter.core.shards import cut, shard_of, stored
from porter.core.tensorplan import Step, TensorPlan
from runtime.layers import RMSNorm
from runtime.parallel.mesh import Run
from runtime.quality import quality


class Read(Protocol):
    def __call__(self, name: str, *index: slice) -> Tensor:
        """A stored tensor, or the part of it that `index` says."""


Share = Callable[[TensorPlan, Step, Read], list[Tensor]]  # a step's outputs, as far as this process holds them


def whole(plan: TensorPlan, step: Step, read: Read) -> list[Tensor]:
    """A step's outputs."""
    values = [read(name) for name in step.sources]
    for op in step.ops:
        values = op.compute(values, torch)
    return values


def share(run: Run | None) -> Share:
    """What `runtime.loader.fill` takes: a step's outputs as far as this rank holds them."""
    return whole if run is None or run.size("tp") == 1 else part_of(run.index("tp"), run.size("tp"))


def part_of(rank: int, ranks: int) -> Share:
    """The outputs of a step as far as `rank` holds them; only its rows are read, where the ops allow."""

    def part(plan: TensorPlan, step: Step, read: Read) -> list[Tensor]:
        cuts = [cut(plan, step, output, rank, ranks) for output in step.outputs]
        if len(cuts) == 1 and (held := cuts[0]) is not None and (places := stored(plan, step, held)) is not None:
            before = (slice(None),) * held.dim
            return [torch.cat([read(name, *before, slice(*rows)) for name, *rows in places], dim=held.dim)]
        values = whole(plan, step, read)
        for i, held in enumerate(cuts):
            if held is not None:
                pieces = [values[i].narrow(held.dim, begin, end - begin) for begin, end in held.ranges]
                values[i] = torch.cat(pieces, dim=held.dim)
        return values

    return part


def distribute(module: nn.Module, plan: TensorPlan, run: Run | None) -> None:
    """Make the layers that the plan's rules share tensor-parallel, before the module is filled.

    Raises:
        UsageError: no rule shares anything, the ranks cannot share a tensor evenly, or quality `exact` is asked for.
        RecipeError: a rule shares what is no linear layer or norm, or one of a layer's tensors and not the other.
    """
    if run is None or run.size("tp") == 1:
        return
    if quality() == "exact":
        raise UsageError(
            "tensor parallelism adds up in another order than the reference", expected="--quality lossless",
            found="--quality exact", hint="leave out --tp, or --quality exact",
        )  # fmt: skip
    dims: dict[str, dict[str, int]] = {}  # layer -> tensor -> dim
    for step, output in plan.outputs():
        if (shard := shard_of(plan, step, output)) is not None:
            cut(plan, step, output, run.index("tp"), run.size("tp"))  # before gigabytes are read
            layer, _, leaf = output.name.rpartition(".")
            dims.setdefault(layer, {})[leaf] = shard.dim
    if not dims:
        raise UsageError(
            f"{type(module).__name__} cannot be shared by tensor-parallel ranks", expected="rules with a shard",
            found=f"none in {plan.recipe}", hint="share the tokens instead: --ulysses or --ring",
        )  # fmt: skip
    parallelize_module(
        module, run.mesh["tp"], {name: _style(name, module.get_submodule(name), found) for name, found in dims.items()},
        src_data_rank=None,
    )  # fmt: skip


def _style(name: str, layer: nn.Module, dims: dict[str, int]) -> ParallelStyle:
    """How a layer is shared whose tensors are cut along `dims`."""
    has_bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear) and dims == {"weight": 0} | ({"bias": 0} if has_bias else {}):
        return ColwiseParallel()
    if isinstance(layer, nn.Linear) and dims == {"weight": 1}:
        return RowwiseParallel()
    if isinstance(layer, (nn.RMSNorm, RMSNorm)) and dims == {"weight": 0}:
        return _NormParallel()
    raise RecipeError(
        f"{name} cannot be shared as its rules say",
        expected="a linear layer's outputs (weight and bias) or inputs, or the weight of an RMSNorm",
        found=f"{type(layer).__name__}: " + ", ".join(f"{leaf} along dim {dim}" for leaf, dim in dims.items()),
        hint="correct the shard of the on-load recipe's rules",
    )  # fmt: skip


class _NormParallel(ParallelStyle):
    """An RMSNorm over what the ranks share: each has its part of the width, the squares are summed over all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.get_parameter("weight"), device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        width, group = weight.shape[0], device_mesh.get_group()
        given: Any = module.eps

        def forward(x: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            squares = wide.square().sum(-1, keepdim=True)
            dist.all_reduce(squares, group=group)
            eps: float = torch.finfo(x.dtype).eps if given is None else given
            held: Any = module.weight  # a DTensor
            normed: Tensor = wide * torch.rsqrt(squares / width + eps) * held.to_local()
            return normed.to(x.dtype)

        module.forward = forward
        return module


def placed(old: Tensor, new: Tensor) -> Tensor:
    """`new`, the part that this rank holds, as what stood in its place."""
    if not isinstance(old, DTensor):
        return new
    return DTensor.from_local(
        new, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )
