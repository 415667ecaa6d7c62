"""What each process of a test's job runs: every mode against the same in one process, in float32 and float64.

    python -m torch.distributed.run … -m tests.runtime.parallel.worker FOLDER

FOLDER holds `port`, the pipeline; rank 0 writes `results<processes>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conversions.flux1.model import FluxTransformer
from porter.core.errors import RecipeError, UsageError
from porter.core.onload import on_load
from porter.core.ops import Concat
from porter.core.recipe import INPUTS, OUTPUTS, Rule
from runtime.attention import attention, attention_backend, cross_attention
from runtime.layers import PackedLinear, RMSNorm
from runtime.loader import load_module
from runtime.parallel import mesh, sequence, tensor
from runtime.parallel.guidance import predict
from runtime.parallel.mesh import Parallel, Run, start
from runtime.quality import at_quality
from runtime.registry import load

DTYPES = (torch.float32, torch.float64)
CPU = torch.device("cpu")
JOBS = {
    2: (Parallel(tp=2), Parallel(ulysses=2), Parallel(ring=2), Parallel(cfg=2)),
    4: (
        Parallel(tp=4), Parallel(ulysses=2, ring=2), Parallel(tp=2, ulysses=2), Parallel(cfg=2, tp=2), Parallel(ring=4),
    ),
}  # fmt: skip


# --- a model: both passes of a guided step ---------------------------------------------------------------------------


@cache  # cleared for each job
def flux(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    return load_module(FluxTransformer, config, folder, dtype=dtype, device=CPU)


def passes(config: dict[str, Any], dtype: torch.dtype, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Two pictures of rows x columns tokens with five words each, and the same with seven other words."""
    draw = torch.Generator().manual_seed(3)
    rows, columns = size
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    common = {"hidden_states": random(2, rows * columns, config["in_channels"]), "img_ids": grid}
    common |= {"timestep": torch.tensor([0.9, 0.3], dtype=dtype), "guidance": torch.tensor([3.5, 1.0])}
    return [
        common
        | {
            "encoder_hidden_states": random(2, words, config["joint_attention_dim"]),
            "pooled_projections": random(2, config["pooled_projection_dim"]),
            "txt_ids": torch.zeros(words, 3),
        }
        for words in (5, 7)
    ]


# --- a LoRA beside shared weights -------------------------------------------------------------------------------------


@cache  # cleared for each job
def adapted(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer of the pipeline in FOLDER, with a LoRA of every linear layer beside its weights."""
    pipeline = load(folder / "port", dtype=dtype, device=CPU)
    pipeline.loras.add(folder / "lora.safetensors", scale=0.7)
    transformer: nn.Module = pipeline.modules["transformer"]
    return transformer


def write_lora(folder: Path) -> None:
    draw, tensors = torch.Generator().manual_seed(8), {}
    for name, weight in load_file(next((folder / "port" / "transformer").glob("*.safetensors"))).items():
        if name.endswith(".weight") and weight.ndim == 2:
            stem = "transformer." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(3, weight.shape[1], generator=draw)
            tensors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 3, generator=draw)
    save_file(tensors, folder / "lora.safetensors")


# --- a layer whose norms run over all heads ---------------------------------------------------------------------------


class Block(nn.Module):
    """Attention with an RMSNorm over all heads, and a gated MLP whose two inputs are packed."""

    on_load = on_load(
        "block",
        Rule(("to_q.{p:weight|bias}", "to_k.{p}", "to_v.{p}"), "to_qkv.{p}", Concat(), "one product", shard=OUTPUTS),
        Rule("norm_{n:q|k}.weight", "norm_{n}.weight", shard=OUTPUTS),
        Rule("to_out.{p:weight|bias}", "to_out.{p}", shard=INPUTS),
        Rule(("gate.{p:weight}", "up.{p}"), "gate_up.{p}", Concat(), "one product", shard=OUTPUTS),
        Rule("down.{p:weight}", "down.{p}", shard=INPUTS),
    )

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.to_qkv = PackedLinear(width, (width, width, width))
        self.norm_q, self.norm_k = RMSNorm(width), nn.RMSNorm(width, eps=1e-5)
        self.to_out = nn.Linear(width, width)
        self.gate_up = PackedLinear(width, (3 * width, 3 * width), bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Block:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        x = sequence.scatter(x)
        q, k, v = self.to_qkv.parts(x)
        q, k, v = (y.unflatten(-1, (-1, self.head)) for y in (self.norm_q(q), self.norm_k(k), v))
        x = x + self.to_out(attention(q, k, v))
        gate, up = self.gate_up.parts(x)
        return sequence.gather(x + self.down(torch.nn.functional.silu(gate) * up))


def block(folder: Path, dtype: torch.dtype) -> nn.Module:
    return load_module(Block, {"width": 32, "head": 8}, folder, dtype=dtype, device=CPU)


def write_block(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(5)
    shapes = {f"{name}.weight": (32, 32) for name in ("to_q", "to_k", "to_v", "to_out")}
    shapes |= {f"{name}.bias": (32,) for name in ("to_q", "to_k", "to_v", "to_out")}
    shapes |= {"norm_q.weight": (32,), "norm_k.weight": (32,)}
    shapes |= {"gate.weight": (96, 32), "up.weight": (96, 32), "down.weight": (32, 96)}
    save_file({name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}, folder / "w.safetensors")


# --- attention alone ------------------------------------------------------------------------------------------------

# case: text tokens, sequence tokens, kind of mask
CASES = {
    "attention": (5, 12, ""),
    "attention, uneven": (5, 13, ""),
    "attention, no text": (0, 13, ""),
    "attention, less tokens than ranks": (3, 1, ""),
    "attention, text alone": (6, 0, ""),
    "attention, two prompts": (6, 13, "text"),
    "attention, two prompts and two sizes": (6, 13, "both"),
    "attention, own mask of the part": (6, 13, "part"),
    "attention, a block of padding": (0, 16, "block"),
    "attention, math": (5, 13, "math"),
    "cross-attention": (7, 13, "cross"),
}


def drawn(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """q, k and v (3, 2, L, 4, 8) and the mask (2, L)."""
    text, tokens, kind = CASES[case]
    draw = torch.Generator().manual_seed(11)
    qkv = torch.randn(3, 2, text + tokens, 4, 8, generator=draw, dtype=torch.float64).to(dtype)
    mask = torch.ones(2, text + tokens, dtype=torch.bool)
    if kind in ("text", "both", "part"):
        mask[1, 2:text] = False  # the second prompt is two words long
    if kind in ("both", "part"):
        mask[0, -4:] = False
    if kind == "block":
        mask[0, :8] = mask[1, 4:] = False  # of some rank nothing is left
    return qkv, None if mask.all() else mask


def attended(case: str, dtype: torch.dtype) -> Tensor:
    """The case through the runtime's own calls, in whatever job this is."""
    text, tokens, kind = CASES[case]
    (q, k, v), mask = drawn(case, dtype)
    if kind == "cross":
        return sequence.gather(cross_attention(sequence.scatter(q[:, text:]), k[:, :text], v[:, :text]))
    q, k, v = (torch.cat((x[:, :text], sequence.scatter(x[:, text:])), dim=1) for x in (q, k, v))
    if mask is not None and kind == "part":
        mask = torch.cat((mask[:, :text], sequence.scatter(mask[:, text:])), dim=1)
    with attention_backend("math" if kind == "math" else "sdpa", ("sdpa", "math")):
        x = attention(q, k, v, mask, shared=text)
    return torch.cat((x[:, :text], sequence.gather(x[:, text:])), dim=1) if tokens else x


def two_sequences(dtype: torch.dtype) -> Tensor:
    """Sequences of 13 and 14 tokens, whose parts would be equally long, in one forward pass."""
    (q, k, v), _ = drawn("attention, uneven", dtype)
    long, short = ([sequence.scatter(x[:, 4 + less :]) for x in (q, k, v)] for less in (0, 1))
    first, second = attention(*long), attention(*short)
    return torch.cat((sequence.gather(first), sequence.gather(second)), dim=1)


# --- the modes ------------------------------------------------------------------------------------------------------


def gap(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def modes(folder: Path, shares_tokens: bool = True) -> dict[str, Callable[[torch.dtype], list[Tensor]]]:
    """Name -> tensors; the same code in one process and in a job of several."""
    port = folder / "port" / "transformer"
    config = json.loads((port / "config.json").read_text())
    found: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
        "model": lambda dtype: predict(flux(port, dtype), passes(config, dtype, (3, 4))),
        "model, uneven": lambda dtype: predict(flux(port, dtype), passes(config, dtype, (1, 13))),
        "model, one pass": lambda dtype: predict(flux(port, dtype), passes(config, dtype, (5, 3))[:1]),
        "lora": lambda dtype: predict(adapted(folder, dtype), passes(config, dtype, (3, 4))),
        "block": lambda dtype: predict(block(folder / "block", dtype), [{"x": torch.randn(2, 11, 32, dtype=dtype)}]),
    }
    if shares_tokens:
        found["two sequences"] = lambda dtype: [shared_tokens(lambda: two_sequences(dtype))]
    for case in CASES if shares_tokens else ():
        found[case] = lambda dtype, case=case: [shared_tokens(lambda: attended(case, dtype))]  # type: ignore[misc]
    return found


def shared_tokens(call: Callable[[], Tensor]) -> Tensor:
    with sequence.sharing(mesh.current()):
        return call()


def measured(all_modes: dict[str, Any], expected: dict[str, Any], run: Run) -> dict[str, dict[str, float]]:
    """The largest gap of each mode over all ranks."""
    gaps = []
    for name, make in all_modes.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            pairs = zip(make(dtype), expected[name, dtype], strict=True)
            gaps.append(max(gap(ours, theirs) for ours, theirs in pairs))
    worst = torch.tensor(gaps, dtype=torch.float64)
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    values = iter(worst.tolist())
    return {f"{run.settings}: {name}": {str(d).split(".")[1]: next(values) for d in DTYPES} for name in all_modes}


@contextmanager
def packed_plainly() -> Iterator[None]:
    """The fault of cutting a packed tensor in equal stretches, whatever it was packed of."""
    right = tensor.cut

    def plain(plan: Any, step: Any, output: Any, rank: int, ranks: int) -> Any:
        held = right(plan, step, output, rank, ranks)
        share = output.shape[held.dim] // ranks if held else 0
        return held and type(held)(held.dim, ((rank * share, (rank + 1) * share),))

    tensor.cut = plain
    try:
        yield
    finally:
        tensor.cut = right


def refusals(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What each call is refused with; one that is not refused is told so."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "not refused"
        except (UsageError, RecipeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def tensor_parallel_facts(folder: Path, run: Run, expected: dict[str, Any]) -> dict[str, Any]:
    """What only a tensor-parallel job can show."""
    port = folder / "port" / "transformer"
    config = json.loads((port / "config.json").read_text())
    ranks, rank = run.size("tp"), run.index("tp")
    model = flux(port, torch.float32)
    whole = expected["state"]
    wrong, held, all_of_it = [], 0, 0
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held, all_of_it = held + local.numel(), all_of_it + whole[name].numel()
        if not torch.equal(local, by_hand(name, whole[name], rank, ranks)):
            wrong.append(name)
    found: dict[str, Any] = {"wrong parts": wrong, "held": held / all_of_it}
    given = passes(config, torch.float32, (3, 4))
    right = expected["model", torch.float32][0]
    with packed_plainly():
        found["plain"] = gap(predict(flux.__wrapped__(port, torch.float32), given[:1])[0], right)
    found["lora"] = gap(predict(adapted(folder, torch.float32), given[:1])[0], right)
    low = predict(flux(port, torch.bfloat16), passes(config, torch.bfloat16, (3, 4))[:1])[0]
    found["bfloat16"] = [gap(each.float(), right) for each in (low, expected["bfloat16"])]

    def exactly() -> None:
        with at_quality("exact"):
            flux.__wrapped__(port, torch.float32)

    return found | refusals({"exact": exactly, "odd": lambda: load_odd(folder / "block")})


def load_odd(folder: Path) -> None:
    """A rule that shares a layer's weight and forgets its bias."""
    rule = Rule("to_out.{p:weight}", "to_out.{p}", shard=OUTPUTS)
    rules = tuple(rule if old.head.startswith("to_out") else old for old in Block.on_load.rules)
    odd = type("Odd", (Block,), {"on_load": replace(Block.on_load, rules=rules)})
    load_module(odd, {"width": 32, "head": 8}, folder, dtype=torch.float32, device=CPU)


def sequence_facts(run: Run) -> dict[str, Any]:
    """What a job that shares tokens refuses."""
    x = torch.randn(1, 6, 3, 8)
    with sequence.sharing(run):
        part = sequence.scatter(x)

        def without_lse() -> None:
            with attention_backend("flex", ("flex",)):
                attention(*[part.repeat(1, 1, 4, 1)] * 3)

        calls = {
            "heads": lambda: attention(part, part, part),
            "structure": lambda: attention(*[part.repeat(1, 1, 4, 1)] * 3, torch.ones(1, 1, 6, 6).bool()),
            "length": lambda: attention(x, x, x),
            "model": lambda: predict(nn.Linear(8, 8), [{"input": x}]),
        }
        return refusals(calls | ({"backend": without_lse} if run.size("ring") > 1 else {}))


def by_hand(name: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's part of one of FLUX.1's tensors; no recipe takes part."""

    def of(parts: list[Tensor], dim: int) -> Tensor:
        return torch.cat([part.chunk(ranks, dim)[rank] for part in parts], dim)

    if ".to_qkv_mlp." in name:  # q, k, v, and four times as much
        sevenths = whole.chunk(7)
        return of([*sevenths[:3], torch.cat(sevenths[3:])], 0)
    if ".to_qkv." in name or ".add_qkv_proj." in name:
        return of(list(whole.chunk(3)), 0)
    if name.startswith("single_transformer_blocks") and name.endswith(".proj_out.weight"):
        fifths = whole.chunk(5, dim=1)
        return of([fifths[0], torch.cat(fifths[1:], dim=1)], 1)
    if name.endswith((".to_out.0.weight", ".to_add_out.weight", ".net.2.weight")):
        return of([whole], 1)
    return of([whole], 0) if ".net.0.proj." in name else whole


@torch.no_grad()
def main() -> None:
    folder, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    expected: dict[Any, Any] = {}
    for settings in JOBS[world]:
        with start(settings, "cpu") as run:
            assert run is not None
            if run.main and not expected:
                write_block(folder / "block")
                write_lora(folder)
            assert run.share(run.rank) == 0  # and rank 0 has written its file
            expected = expected or alone(modes(folder), folder)
            flux.cache_clear()
            adapted.cache_clear()
            shares_tokens = settings.ulysses * settings.ring > 1
            results |= measured(modes(folder, shares_tokens), expected, run)
            if settings.tp > 1:
                results[f"{settings}: tensor facts"] = tensor_parallel_facts(folder, run, expected)
            if shares_tokens:
                results[f"{settings}: sequence facts"] = sequence_facts(run)
            if settings.cfg > 1:
                three = {"three passes": lambda: predict(nn.Linear(8, 8), [{"input": torch.zeros(8)}] * 3)}
                results[f"{settings}: guidance facts"] = refusals(three)
            if run.main:
                (folder / f"results{world}.json").write_text(json.dumps(results))


def alone(all_modes: dict[str, Any], folder: Path) -> dict[Any, Any]:
    """What one process makes, as if there were no job."""
    before, mesh._current = mesh._current, None
    try:
        port = folder / "port" / "transformer"
        config = json.loads((port / "config.json").read_text())
        found: dict[Any, Any] = {"state": flux(port, torch.float32).state_dict()}
        found["bfloat16"] = flux(port, torch.bfloat16)(**passes(config, torch.bfloat16, (3, 4))[0])
        for name, make in all_modes.items():
            for dtype in DTYPES:
                torch.manual_seed(0)
                found[name, dtype] = make(dtype)
    finally:
        mesh._current = before
    return found


if __name__ == "__main__":
    main()
