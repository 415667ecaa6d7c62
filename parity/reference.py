"""The reference side of a case: built, filled, called and recorded.

With `case.py`, `recorder.py`, `drawn.py` and `shims*.py` beside it this file runs in the reference's own interpreter,
which needs torch, safetensors and numpy only:

    python -m parity.reference CASE.py -o trace.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from parity import stubs
from parity.case import Case, Named
from parity.casename import split_case
from parity.exact import tables
from parity.loading import CaseError, inputs_of, load_case
from parity.perturb import PERTURBED, guard_passes
from parity.recorder import (
    Recording,
    Watch,
    aliases,
    attributes,
    file_sha256,
    owners,
    plain_modules,
    record,
    told,
)  # fmt: skip
from parity.state import built, built_dtypes, computed, state_of, state_sha256
from parity.tied import tied

LEVELS = ("component", "block", "module")
MARK = "parity.reference: "  # before the one message that a failed recording ends with


def leaves_and_parents(module: nn.Module) -> tuple[list[str], list[str]]:
    """Modules with parameters of their own: those below which nothing else has any, and the others."""
    paths = owners(module)
    parents = [p for p in paths if any(q != p and (not p or q.startswith(p + ".")) for q in paths)]
    return [p for p in paths if p not in parents and p], parents


def blocks_of(module: nn.Module) -> list[str]:
    """Entries of the module lists that lie in no other module list."""
    found: list[str] = []
    for path, child in module.named_modules():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not any(path.startswith(b + ".") for b in found):
            found += [f"{path}.{name}" if path else name for name, _ in child.named_children()]
    return found


def around(case: Case, module: nn.Module, inside: str = "") -> list[str]:
    """Modules that are called and have others with weights in them, below `inside`: blocks, attentions."""
    leaves, _ = leaves_and_parents(module)
    return [
        path
        for path, m in module.named_modules()
        if any(leaf.startswith(f"{path}.") for leaf in leaves) and not isinstance(m, (nn.ModuleList, nn.ModuleDict))
        if path and path not in case.modules and not any(b.matches(path) for b in case.blocks)
        if path == inside or path.startswith(f"{inside}." if inside else "")
    ]


def watches(case: Case, module: nn.Module, level: str, inside: str = "") -> list[Watch]:
    """What to record at a level; `inside` narrows `module` to what lies in one block."""
    if level == "component":
        return []
    leaves, _ = leaves_and_parents(module)
    paths = blocks_of(module) if level == "block" else leaves
    if inside:
        paths = [p for p in leaves if p.startswith(inside + ".")]
    declared = [p for p, _ in module.named_modules() if any(b.matches(p) for b in case.blocks)]
    skip = re.compile(case.skip) if case.skip else None
    plain = [*plain_modules(module), *around(case, module, inside)] if level == "module" else []
    # Of a block that no argument map describes only the outputs can be compared, where both sides cut it alike.
    whole = [*declared, *paths] if level != "block" or inside else declared
    inner = [p for p in plain if not inside or p == inside or p.startswith(inside + ".")]
    kinds = (([*whole, *inner], True), ([p for p in paths if p not in whole], False))
    found = []
    for chosen, inputs in kinds:
        # A trace's keys put the call behind a #: a module with one in its name is recorded by nothing, and so no pass.
        keep = [p for p in dict.fromkeys(chosen) if not (skip and skip.fullmatch(p)) and "#" not in p]
        if keep:
            found.append(Watch("|".join(map(re.escape, keep)), inputs=inputs))
    return found


def record_reference(
    case: Case, seed: int, level: str = "module", *, inside: str = "", guards: bool = True, dtype: str = "float32"
) -> Recording:
    """Build, fill and run the reference of a case -> its Recording.

    Args:
        level: what to record, see `watches`; `inside` narrows `module` to one block.
        guards: whether to run it again with each input changed.
        dtype: a lossy one to run in too; how far that is from float64 is kept.

    Raises:
        CaseError: the reference does not build, does not take its weights, or does not run.
    """
    module = built(case, seed)
    kinds = built_dtypes(module)
    module = module.float().eval()
    kept = computed(case, module)
    notes: list[str] = []
    exact = tables(module, lambda: case.reference.module(case.config), seed, notes)
    state = state_of(case, module, seed, kept)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CaseError(f"the reference does not take its weights: {error}") from error
    given = inputs_of(case, seed)
    passes: dict[str, tuple[Callable[[Any, Named], Any], Named]] = {}
    for name, inputs in given.items():
        if name not in case.reference.passes:
            raise CaseError(f"the reference has no call for the pass {name!r}")
        passes[name] = (case.reference.passes[name], inputs)
    leaves, parents = leaves_and_parents(module)
    meta = {
        "component": case.name,
        "reference": {"name": case.reference.name or f"{type(module).__module__}:{type(module).__qualname__}"},
        "source": {"file": str(case.weights or "drawn"), "sha256": state_sha256(state)},
        "weights": {
            "seed": seed,
            "tied": tied(module),
            "shapes": {name: list(t.shape) for name, t in state.items() if t.is_floating_point()},
        },
        "config": json.loads(json.dumps(dict(case.config), default=str)),
        "seed": seed,
        "parents": parents,
        "leaves": leaves,
        "aliases": aliases(module),
        "attributes": attributes(module),
        "dtypes": kinds,
        "level": "inside" if inside else level,
        "plain": {p: kind for p, kind in plain_modules(module).items() if p not in case.modules},
        "around": around(case, module, inside) if level == "module" else [],
        "skip": case.skip,
        "skipped": [path for path in leaves if case.skip and re.fullmatch(case.skip, path)],
    }
    lossy = [dtype] if dtype != "float32" else []
    watched = watches(case, module, level, inside)
    double = case.reference.float64
    try:
        recording = record(module, passes, watched, meta, seed=seed, double=double, dtypes=lossy, exact=exact)
    except (Exception, SystemExit) as error:
        try:
            if not lossy:
                raise
            recording = record(module, passes, watched, meta, seed=seed, double=double, exact=exact)
            notes.append(f"the reference does not run in {dtype} ({told(error)})")
            lossy = []
        except (Exception, SystemExit) as again:
            recording, double = (
                _single(again, case, lambda: record(module, passes, watched, meta, seed=seed, double=False)),
                False,
            )
    if empty := stubs.install(case.reference.stubs):
        notes.append(f"imported and empty: {', '.join(empty)}")
    if kept and case.weights is None:
        notes.append(f"not drawn, as its class computes it: {', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}")
    if notes:
        recording.meta["notes"] = [*recording.meta.get("notes", []), *notes]
    for name in passes:
        if not any(event.key.startswith(f"{name}/=.out.") for event in recording.events):
            raise CaseError(
                f"the reference's pass {name!r} returns nothing that can be compared: no tensor and no number"
            )
    for name, inputs in (guard_passes(case, given, seed) if guards else {}).items():
        call = case.reference.passes[name.partition(PERTURBED)[0]]
        try:
            changed = record(
                module, {name: (call, inputs)}, [], {}, seed=seed, double=double, dtypes=lossy, exact=exact
            )
            recording.extend(changed)
        except (Exception, SystemExit) as error:  # not every input takes another value
            base, _, key = name.partition(PERTURBED)
            why = f"{base}: with {key} changed the reference does not run, so no effect of it is proven ({told(error)})"
            recording.meta["notes"] = [*recording.meta.get("notes", []), why]
    for name, tensor in state.items():  # what the candidate gets is drawn again, but for what was computed
        if case.weights is None and (not tensor.is_floating_point() or name in kept):
            recording.tensors[f"state/{name}"] = tensor.contiguous()
            if name in exact and tensor.is_floating_point():
                recording.tensors[f"exact/{name}"] = exact[name][1].contiguous()
    return recording


def _single(error: BaseException, case: Case, again: Callable[[], Recording]) -> Recording:
    """A recording in float32 alone, after one in both precisions failed; the failure is noted.

    Raises:
        CaseError: that fails too, or nothing else was tried before.
    """
    try:
        if not case.reference.float64:
            raise error
        recording = again()
    except (Exception, SystemExit) as last:
        raise CaseError(f"the reference does not run: {told(last)}") from last
    why = f"the reference does not run in float64 ({told(error)})"
    recording.meta["notes"] = [*recording.meta.get("notes", []), why]
    return recording


def commit_of(repo: Path | None) -> str:
    """The commit of a checkout, empty where git does not say; nothing is written to it."""
    if repo is None:
        return ""
    command = ["git", "--no-optional-locks", "-C", str(repo), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Record a case's reference; exit code 6 with one line where it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m parity.reference", description="Record a case's reference.")
    parser.add_argument("case", help="FILE.py or FILE.py:NAME")
    parser.add_argument("--reference-repo", type=Path, help="checkout of the original code, put on sys.path")
    parser.add_argument(
        "--shims",
        nargs="?",
        const="",
        help="CPU equivalents of flash_attn, xformers, apex, timm; or of these, by commas",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", choices=LEVELS, default="module")
    parser.add_argument("--inside", default="", help="record what lies in this module of the reference only")
    parser.add_argument("--weights", type=Path, help="the reference's weights, in place of the case's")
    parser.add_argument("--dtype", default="float32", help="run in this lossy dtype too")
    parser.add_argument("-o", "--out", required=True, type=Path)
    options = parser.parse_args(argv)
    if options.reference_repo is not None:
        sys.path.insert(0, str(options.reference_repo.absolute()))
    path, _ = split_case(options.case)
    sys.path.append(str(path.absolute().parent))  # for what the case imports while it builds
    used: Callable[[], Sequence[str]] = list
    try:
        if options.shims is not None:
            from parity import shims

            shims.install([name for name in options.shims.split(",") if name] or None)
            used = shims.used
        case = load_case(options.case)
        case = dataclasses.replace(case, weights=options.weights) if options.weights else case
        recording = record_reference(case, options.seed, options.level, inside=options.inside, dtype=options.dtype)
    except (CaseError, ValueError) as error:
        print(f"{MARK}{error}", file=sys.stderr)
        return 6
    recording.meta |= {
        "command": " ".join(["python -m parity.reference", *(sys.argv[1:] if argv is None else argv)]),
        "case": {"file": path.name, "sha256": file_sha256(path)},
        "shims": list(used()),
        "python": platform.python_version(),
    }
    recording.meta["reference"]["commit"] = commit_of(options.reference_repo)
    if used():
        note = f"CPU stand-ins ran in place of {', '.join(used())}"
        recording.meta["notes"] = [*recording.meta.get("notes", []), note]
    recording.save(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
