"""Record reference traces: what the original code computes on drawn weights, at tiny size.

    python -m conversions.record_reference sd3 --reference-repo <checkout of Stability-AI/sd3.5>
    python -m conversions.record_reference sd3 --weights transformer-medium    # its weights alone, without a checkout

A family's `record.py` lists its `Original`s: how the original code is built, called and filled. Its weights are drawn
(`parity.drawn`), so the original never sees a converted file, and nothing of the recipes is imported here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import parity.recorder as recorder
from parity.drawn import draw
from parity.recorder import Call, Watch, file_sha256, record
from parity.reference import commit_of
from parity.trace import Trace
from porter.core.checkpoint import TensorInfo, header_bytes
from porter.core.errors import MissingError, PorterError, UsageError

HERE = Path(__file__).parent
COMMAND = "python -m conversions.record_reference"
MAX_BYTES = 1_000_000  # of a committed trace
Passes = Mapping[str, tuple[Call, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Original:
    """The original code of one component, at a tiny size.

    Attributes:
        name: of the trace: `transformer`, or `transformer-large` where a family has several variants.
        component: the component's name in a pipeline.
        repository, commit: the original code, `owner/name`.
        files: of the checkout, that are run; their hashes stand in the trace.
        build: () -> module, on the CPU, after `paths` of the checkout were made importable.
        passes: (module, generator) -> pass name -> (function that runs the module, named float32 inputs).
        config: what the component's tensors do not say, in the words of its config.json.
        paths: folders of the checkout that go on sys.path.
        absent: modules that only a GPU needs; importing them gives empty ones.
        skip: regular expression of modules whose outputs are not recorded, because the other side has no such value.
        samples: elements kept of each module's tensors.
        rename: (state name) -> name in released files, where the class has other names.
        note: what was changed in the original code so that it runs here; stands in the trace.
    """

    name: str
    component: str
    repository: str
    commit: str
    files: tuple[str, ...]
    build: Callable[[], nn.Module]
    passes: Callable[[Any, torch.Generator], Passes]
    config: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[str, ...] = ("",)
    absent: tuple[str, ...] = ()
    skip: str = ""
    samples: int = 48
    rename: Callable[[str], str] = str
    note: str = ""

    def trace(self, family: str) -> Path:
        """Where the committed trace lies."""
        return HERE / family / "reference" / f"{self.name}.safetensors"


@contextmanager
def importable(original: Original, checkout: Path) -> Any:
    """Make the checkout's folders importable, and give empty modules for those that only a GPU needs."""
    from conversions.record_layouts import Absent

    missing = [name for name in original.files if not (checkout / name).is_file()]
    if missing:
        raise MissingError(
            f"{checkout} is not a checkout of {original.repository}", expected=missing[0],
            hint=f"git clone https://github.com/{original.repository} && git checkout {original.commit}",
        )  # fmt: skip
    empty = [name for name in original.absent if name not in sys.modules]
    sys.modules.update({name: Absent(name) for name in empty})
    before = list(sys.path)
    sys.path[:0] = [str(checkout / path) for path in original.paths]
    try:
        yield
    finally:
        sys.path[:] = before
        # Another checkout's `utils` or `models` is another module, and others ask whether what is absent is there.
        for name in (*_modules_of(checkout), *empty):
            sys.modules.pop(name, None)


def _modules_of(checkout: Path) -> list[str]:
    """The imported modules and packages that lie in a checkout."""
    found = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    places = {
        name: [spec.origin, *(spec.submodule_search_locations or ())]
        for name, spec in found.items()
        if isinstance(spec, ModuleSpec)
    }
    return [name for name, own in places.items() if any(str(place).startswith(f"{checkout}/") for place in own)]


def fill(module: nn.Module, seed: int, rename: Callable[[str], str] = str) -> dict[str, tuple[int, ...]]:
    """Give every tensor of a module's state its drawn numbers -> name (as a released file has it) and shape of each."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            shapes[rename(name)] = tuple(tensor.shape)
            tensor.copy_(torch.from_numpy(draw(rename(name), tuple(tensor.shape), seed)))
    return shapes


def record_original(original: Original, family: str, checkout: Path, seed: int) -> recorder.Recording:
    """Run the original code -> Recording. The checkout is not changed."""
    with importable(original, checkout):
        torch.manual_seed(seed)
        module = original.build().float().eval()
        shapes = fill(module, seed, original.rename)
        passes = original.passes(module, torch.Generator().manual_seed(seed))
        leaves = "|".join(
            path.replace(".", r"\.")
            for path, child in module.named_modules()
            if path and any(True for _ in child.parameters(recurse=False))
        )
        watched = Watch(f"(?!(?:{original.skip})$)(?:{leaves})" if original.skip else leaves, original.samples)
        partial = original.trace(family).with_suffix(".weights")
        partial.parent.mkdir(exist_ok=True)
        digest = write_drawn(partial, shapes, seed)
        size = partial.stat().st_size
        partial.unlink()
        meta = {
            "component": original.component,
            "reference": {
                "name": type(module).__module__ + ":" + type(module).__qualname__,
                "repository": f"https://github.com/{original.repository}",
                "commit": commit_of(checkout),
                "files": {name: file_sha256(checkout / name) for name in original.files},
            },
            "command": f"{COMMAND} {family} --only {original.name} --reference-repo <checkout>",
            "recorder": file_sha256(Path(recorder.__file__)),
            "source": {"file": f"{original.name}.safetensors", "sha256": digest, "bytes": size},
            "weights": {"seed": seed, "shapes": {name: list(shape) for name, shape in shapes.items()}},
            "config": dict(original.config),
            "seed": seed,
        } | ({"note": original.note} if original.note else {})
        return record(module, passes, [watched], meta)


def write_drawn(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> str:
    """Write a safetensors file of drawn float32 tensors -> its sha256."""
    infos = [TensorInfo(name, "F32", tuple(shape), None, 0, 0) for name, shape in shapes.items()]
    digest = hashlib.sha256()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            for data in (header_bytes(infos, {}), *(draw(i.name, i.shape, seed).tobytes() for i in infos)):
                digest.update(data)
                file.write(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def write_weights(trace: Path, path: Path) -> dict[str, Any]:
    """Write the weights that a trace was recorded on -> what the tensors do not say, for `--config`.

    Raises:
        PorterError: this machine draws other numbers than the trace was recorded with.
    """
    meta = Trace.open(trace).meta
    weights = meta["weights"]
    found = write_drawn(path, {name: tuple(shape) for name, shape in weights["shapes"].items()}, weights["seed"])
    if found != meta["source"]["sha256"]:
        raise PorterError(
            f"the weights of {trace.name} came out differently here", expected=meta["source"]["sha256"], found=found,
            hint="record the trace again",
        )  # fmt: skip
    return dict(meta["config"])


def changed_files(original: Original, checkout: Path) -> list[str]:
    """Those of an original's files that are not, byte for byte, what the checkout's commit holds."""

    def said(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True).stdout.strip()

    return [name for name in original.files if said("rev-parse", f"HEAD:{name}") != said("hash-object", name)]


def of_this(original: Original, checkout: Path) -> bool:
    """Whether a checkout holds the files of an original."""
    return all((checkout / name).is_file() for name in original.files)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a family's traces; prints their paths and sizes."""
    parser = argparse.ArgumentParser(description="Record what a family's original code computes.")
    parser.add_argument("family")
    parser.add_argument("--reference-repo", type=Path, help="checkout of the original code")
    parser.add_argument("--only", help="one trace by its name")
    parser.add_argument("--weights", metavar="NAME", help="write the weights of a committed trace; needs no checkout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args(argv)
    if options.weights:
        out = options.out or Path(f"{options.weights}.safetensors")
        config = write_weights(HERE / options.family / "reference" / f"{options.weights}.safetensors", out)
        print(f"{out}  {out.stat().st_size / 1e3:.0f} kB; not in its tensors: {config}")
        return 0
    if options.reference_repo is None:
        raise UsageError("recording needs the original code", hint="--reference-repo <checkout>, or --weights NAME")
    originals: tuple[Original, ...] = importlib.import_module(f"conversions.{options.family}.record").ORIGINALS
    for original in originals:
        repository = options.reference_repo
        if options.only not in (None, original.name) or (options.only is None and not of_this(original, repository)):
            continue  # a family's components may come from several repositories
        if commit_of(repository) != original.commit:
            raise UsageError(
                f"{repository} is not at the commit of {original.repository}", expected=original.commit,
                found=commit_of(repository) or "no git checkout", hint=f"git checkout {original.commit}",
            )  # fmt: skip
        if changed := changed_files(original, repository):
            raise UsageError(
                f"{repository} has changed files", expected=f"{original.repository} at {original.commit}",
                found=", ".join(changed), hint=f"git -C {repository} checkout HEAD -- {' '.join(changed)}",
            )  # fmt: skip
        path = options.out or original.trace(options.family)
        record_original(original, options.family, repository, options.seed).save(path)
        size = path.stat().st_size
        print(f"{path}  {size / 1e3:.0f} kB")
        if size > MAX_BYTES:
            raise UsageError(f"{path} is too large to commit", expected=f"{MAX_BYTES} bytes", found=str(size))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except PorterError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
