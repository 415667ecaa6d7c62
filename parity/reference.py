"""The reference side of a case: built, filled, called and recorded.

With `case.py`, `recorder.py`, `drawn.py` and `shims*.py` beside it this file runs in the reference's own interpreter,
which needs torch, safetensors and numpy only:

    python -m parity.reference CASE.py -o trace.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity import stubs
from parity.case import Case, Named
from parity.drawn import draw
from parity.exact import tables
from parity.recorder import (
    Recording,
    Watch,
    attributes,
    file_sha256,
    owners,
    plain_modules,
    record,
    seeded,
    told,
)  # fmt: skip

LEVELS = ("component", "block", "module")
MARK = "parity.reference: "  # before the one message that a failed recording ends with
ALSO = "also missing: "  # before the names of further packages
PERTURBED = "~"  # a pass `forward~mask` is `forward` with its input `mask` changed


class CaseError(Exception):
    """A case that cannot be used: what is wrong with it, in one line."""


class _Aside(MetaPathFinder):
    """Lets a checkout's folder be imported that a case is named after: a file goes before a folder without code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None or fullname != self.file.stem:
            return None
        return PathFinder.find_spec(fullname, [p for p in sys.path if Path(p).absolute() != self.file.parent])


def split_case(name: str) -> tuple[Path, str]:
    """`FILE.py[:NAME]` -> the file and the name, which may be empty. Folders of the path may have `.py` in them."""
    file, _, wanted = name.partition(".py:")
    return Path(file.removesuffix(".py") + ".py"), wanted


def load_case(name: str) -> Case:
    """The case of `FILE.py` (its one Case, or the one called `case`) or `FILE.py:NAME`; the file is run.

    Raises:
        CaseError: no such file, it does not run, or it holds no such case.
    """
    file, wanted = split_case(name)
    path = file.absolute()
    if not path.is_file() or not (wanted or name.endswith(".py")):
        raise CaseError(f"no such case file: {path}; a case is FILE.py or FILE.py:NAME")
    if not any(isinstance(finder, _Aside) and finder.file == path for finder in sys.meta_path):
        sys.meta_path.insert(0, _Aside(path))
    spec = importlib.util.spec_from_file_location(f"parity_case_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CaseError(f"{path.name} does not run: {told(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    found = {key: value for key, value in vars(module).items() if isinstance(value, Case)}
    chosen = wanted or ("case" if "case" in found else next(iter(found), "") if len(found) == 1 else "")
    if chosen not in found:
        has = ", ".join(found) or "none"
        raise CaseError(f"{path.name} has no case {wanted or 'of its own'}; cases in it: {has}; FILE.py:NAME names one")
    return found[chosen]


def built_dtypes(module: nn.Module) -> dict[str, int]:
    """How many tensors of its state a module is built with in which dtype."""
    return dict(Counter(str(t.dtype).removeprefix("torch.") for t in module.state_dict().values()))


def built(case: Case, seed: int) -> nn.Module:
    """The reference's module, as its class makes it.

    Raises:
        CaseError: it does not build, or is no module.
    """
    seeded(seed)
    try:
        module = case.reference.module(case.config)
    except ModuleNotFoundError as error:
        also = _also_missing(case, error)
        more = f" ({ALSO}{', '.join(also)})" if also else ""
        raise CaseError(f"the reference does not build: {told(error)}{more}") from error
    except (Exception, SystemExit) as error:
        raise CaseError(f"the reference does not build: {told(error)}") from error
    if not isinstance(module, nn.Module):
        raise CaseError(f"the reference's build returns {type(module).__name__}, not a torch.nn.Module")
    return module


def _also_missing(case: Case, error: BaseException) -> list[str]:
    """The packages that would be missing next: what fails once those before are there, but empty."""
    found: list[str] = []
    while isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        if name in found or not stubs.install([name]):
            break
        found.append(name)
        try:
            case.reference.module(case.config)
            break
        except (Exception, SystemExit) as following:
            error = following
    return found[1:]


def state_of(case: Case, module: nn.Module, seed: int, kept: Collection[str]) -> dict[str, Tensor]:
    """The reference's state: from the case's file, or drawn from names and the seed; float32.

    Args:
        kept: of `computed`; this, and what is not floating point, stays as the module made it.

    Raises:
        CaseError: the file's tensors are not the module's.
    """
    own = module.state_dict()
    if case.weights is None:
        return {
            name: torch.from_numpy(draw(name, tuple(tensor.shape), seed))
            if tensor.is_floating_point() and name not in kept
            else tensor.clone()
            for name, tensor in own.items()
        }
    pattern = re.compile(case.keep) if case.keep else None
    try:
        given = load_file(case.weights)
    except Exception as error:  # safetensors' own, OSError and more
        raise CaseError(f"the weights {case.weights} cannot be read: {error}") from error
    free = {name for name in own if pattern and pattern.fullmatch(name)}
    if odd := sorted((own.keys() ^ given.keys()) - free):
        missing, extra = ([n for n in odd if n in of][:3] for of in (own, given))
        raise CaseError(f"{case.weights} is not of this module: missing {missing}, left over {extra}")
    wrong = [name for name in given if name in own and given[name].shape != own[name].shape]
    if wrong:
        shapes = tuple(given[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise CaseError(f"{case.weights}: {wrong[0]} has shape {shapes[0]}, the module {shapes[1]}")
    return {
        name: (given[name].float() if own[name].is_floating_point() else given[name]) if name in given else own[name]
        for name in own
    }


def computed(case: Case, module: nn.Module) -> list[str]:
    """The part of a built module's state that its class computes, so that it is not drawn: tables, frequencies.

    `case.keep` names it; besides, buffers, and parameters that are not trained beside others that are, unless all of
    their numbers are zero or one, which is what is filled later.
    """
    kept = re.compile(case.keep) if case.keep else None
    parameters = dict(module.named_parameters())
    trained = any(p.requires_grad for p in parameters.values())
    found = []
    for name, tensor in module.state_dict().items():
        own = name not in parameters or (trained and not parameters[name].requires_grad)
        filled = bool(((tensor != tensor.flatten()[:1]) | ((tensor != 0) & (tensor != 1))).any())
        if (kept and kept.fullmatch(name)) or (own and filled and bool(tensor.isfinite().all())):
            found.append(name)
    return found


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """One hash of all names, dtypes, shapes and contents of a state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    plain = plain_modules(module) if level == "module" else {}
    # Of a block that no argument map describes only the outputs can be compared, where both sides cut it alike.
    whole = [*declared, *paths] if level != "block" or inside else declared
    inner = [p for p in plain if not inside or p.startswith(inside + ".")]
    kinds = (([*whole, *inner], True), ([p for p in paths if p not in whole], False))
    found = []
    for chosen, inputs in kinds:
        keep = [p for p in dict.fromkeys(chosen) if not (skip and skip.fullmatch(p))]
        if keep:
            found.append(Watch("|".join(p.replace(".", r"\.") for p in keep), inputs=inputs))
    return found


def perturbed(name: str, value: Tensor, seed: int) -> Tensor | None:
    """An input with some of its elements changed, as its kind allows; None where nothing can be.

    Masks (boolean, or only zeros and ones) lose the last of what they show, whole numbers (also as floating-point
    ones: positions) change places, others get noise of a tenth of their size. What is the same for all of a batch
    stays so: an implementation may take it once.
    """
    if not value.numel():
        return None
    if value.ndim > 1 and len(value) > 1 and torch.equal(value, value[:1].expand_as(value)):
        one = perturbed(name, value[:1], seed)
        return None if one is None else one.expand_as(value).clone()
    flat = value.reshape(-1)
    if value.dtype == torch.bool or bool(((flat == 0) | (flat == 1)).all()):
        return _hidden(value)
    if torch.equal(flat, flat.round()):
        turned = (value.flip(axis) for axis in (*range(1, value.ndim), 0) if value.ndim)
        other = next((t for t in turned if not torch.equal(t, value)), None)
        return torch.where(value > 0, value - 1, value + 1) if other is None else other
    size = float(flat.abs().float().mean()) or 1.0
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return (flat + 0.1 * size * noise).reshape(value.shape)


def _hidden(mask: Tensor) -> Tensor:
    """A mask whose last row that shows several things shows a quarter less; no row loses all, which would be NaN.

    Where every row shows one thing or none, the last of what is hidden is shown, or else the last of all is hidden.
    """
    rows = mask.reshape(-1, mask.shape[-1] if mask.ndim else 1).clone()
    several = (rows != 0).sum(-1).gt(1).nonzero().flatten()
    if len(several):
        shown = rows[several[-1]].nonzero().flatten()
        rows[several[-1], shown[-max(1, len(shown) // 4) :]] = 0
    else:
        flat = rows.view(-1)
        hidden = (flat == 0).nonzero().flatten()
        flat[hidden[-1] if len(hidden) else -1] = 1 if len(hidden) else 0
    return rows.reshape(mask.shape)


def guard_passes(case: Case, given: Mapping[str, Named], seed: int) -> dict[str, dict[str, Tensor]]:
    """For every pass and every input that is not free: the pass with this input changed."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, inputs in given.items():
        for key, value in inputs.items():
            changed = perturbed(key, value, seed) if key not in case.free else None
            if changed is not None:
                found[f"{name}{PERTURBED}{key}"] = {**inputs, key: changed}
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
            "shapes": {name: list(t.shape) for name, t in state.items() if t.is_floating_point()},
        },
        "config": json.loads(json.dumps(dict(case.config), default=str)),
        "seed": seed,
        "parents": parents,
        "leaves": leaves,
        "attributes": attributes(module),
        "dtypes": kinds,
        "level": "inside" if inside else level,
        "plain": {p: kind for p, kind in plain_modules(module).items() if p not in case.modules},
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
            recording.meta.setdefault("unperturbed", {})[name] = told(error)
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


def inputs_of(case: Case, seed: int) -> dict[str, dict[str, Tensor]]:
    """A case's inputs, checked.

    Raises:
        CaseError: they cannot be made, or are no tensors.
    """
    try:
        given = case.inputs_of(seed)
    except Exception as error:
        raise CaseError(f"the case's inputs cannot be made: {told(error)}") from error
    for name, inputs in given.items():
        for key, value in inputs.items():
            if not isinstance(value, Tensor):
                raise CaseError(
                    f"input {key!r} of {name} is {type(value).__name__}, not a tensor: put it into the call"
                )
    return given


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
