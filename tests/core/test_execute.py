"""Plans become files: bytes in the right places, atomically, whatever happens meanwhile."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from porter.core import execute as module
from porter.core import stream, writer
from porter.core.checkpoint import header_bytes, read_bytes, read_header, spec, specs
from porter.core.errors import BadInputError, CheckpointError, RecipeError, ResourceError, UsageError
from porter.core.execute import apply, execute
from porter.core.lanes import SOURCE_HASH, Lanes
from porter.core.ops import Cast, Concat, Constant, Offset, Same, Split
from porter.core.recipe import Recipe, Rule, TensorPlan, compile_recipe
from tests.core.toy import RECIPE, SHAPES, TARGETS, plan_of

CHILD = """
import resource, signal, sys, time
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
from tests.core.toy import plan_of
from porter.core import execute as module, stream
stream.WINDOW = 16
plan = plan_of(Path(sys.argv[2]))
if sys.argv[4] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
done = 0
def progress(count):
    global done
    done += count
    if sys.argv[4] == "hang" and done > 600:
        print("writing", flush=True)
        time.sleep(60)
print(module.execute(plan, sys.argv[3], progress=progress).sha256)
"""
ROOT = Path(__file__).parents[2]


def tensors() -> dict[str, np.ndarray]:
    """Every element of every tensor is distinct."""
    made, start = {}, 1
    for name, shape in SHAPES.items():
        count = int(np.prod(shape))
        made[name] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
        start += count
    return made


def expected(source: dict[str, Any]) -> dict[str, Any]:
    """The same conversion, written by hand."""
    cat = torch.cat if isinstance(source["a"], torch.Tensor) else np.concatenate
    return {
        "v": source["qkv"][:4], "q": source["qkv"][4:6], "k": source["qkv"][6:],
        "top": cat([source["head"][2:], source["head"][:2]]), "linear": source["conv"][:, :, 0, 0],
        "left": source["wide"][:, :2], "right": source["wide"][:, 2:], "ab": cat([source["a"], source["b"]]),
    }  # fmt: skip


@pytest.fixture
def original(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize("window", [4, 20, 8 << 20])
def test_every_byte_lands_in_its_place(original: Path, tmp_path: Path, window: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "WINDOW", window)
    counts: list[int] = []
    written = execute(
        plan_of(original), tmp_path / "out.safetensors", metadata={"format": "pt"}, progress=counts.append
    )
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == TARGETS.keys()
    for name, want in expected(tensors()).items():
        np.testing.assert_array_equal(found[name], want, err_msg=name)
        assert written.tensors[name] == hashlib.sha256(want.tobytes()).hexdigest()
    content = (tmp_path / "out.safetensors").read_bytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest() and written.bytes == len(content) == sum(counts)
    assert read_header(tmp_path / "out.safetensors")[1] == {"format": "pt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_reads_go_forward(original: Path, tmp_path: Path, monkeypatch: Any) -> None:
    reads: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: reads.append(offset) or real(fd, buffers, offset))
    straight = RECIPE.without_rule("wide").without_rule("head")
    header = {n: t for n, t in read_header(original)[0].items() if n not in ("wide", "head")}
    wanted = {n: t for n, t in TARGETS.items() if n not in ("left", "right", "top")}
    execute(compile_recipe(straight, {}, header, wanted), tmp_path / "out.safetensors")
    assert reads == sorted(reads) and len(reads) > 4


@pytest.fixture
def long_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorPlan:
    """A plan that is treated as a long copy is: written past the page cache in blocks, its source dropped behind."""
    monkeypatch.setattr(stream, "WINDOW", 4096)
    monkeypatch.setattr(stream, "_BEHIND", 4096)
    monkeypatch.setattr(module, "_PARALLEL_HASH", 16)
    for place in (module, writer):
        monkeypatch.setattr(place, "LARGE", 1)
    rng = np.random.default_rng(0)
    save_file({"a": rng.normal(size=(3000,)), "b": rng.normal(size=(3, 1111))}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")[0]
    recipe = Recipe("t", "a", "b", (Rule("a", "a"), Rule("b", ("x", "y"), Split((1, 2)))))
    return compile_recipe(recipe, {}, header)


def right(path: Path, written: module.Written) -> bool:
    """Whether the long copy is what it should be."""
    source, found = load_file(path.with_name("in.safetensors")), load_file(path)
    wanted = {"a": source["a"], "x": source["b"][:1], "y": source["b"][1:]}
    return written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and all(
        found[name].tobytes() == want.tobytes() and written.tensors[name] == hashlib.sha256(want.tobytes()).hexdigest()
        for name, want in wanted.items()
    )


@pytest.mark.parametrize("workers", [1, 2, 5, 6])
def test_long_copies_go_past_the_page_cache(
    long_copy: TensorPlan, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[tuple[int, int, bool]] = []
    dropped: list[int] = []
    pwrite, advise = os.pwrite, os.posix_fadvise

    def note(descriptor: int, data: Any, position: int) -> int:
        writes.append((position, len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return pwrite(descriptor, data, position)

    def forget(descriptor: int, at: int, count: int, how: int) -> None:
        dropped.extend([count] if how == os.POSIX_FADV_DONTNEED else [])
        advise(descriptor, at, count, how)

    monkeypatch.setattr(os, "pwrite", note)
    monkeypatch.setattr(os, "posix_fadvise", forget)
    assert right(tmp_path / "out.safetensors", execute(long_copy, tmp_path / "out.safetensors", workers=workers))
    if not writes[0][2]:
        pytest.skip("this file system takes no direct writes")
    *whole, rest = sorted(writes)  # two are under way at once
    assert all(count % 4096 == 0 == position % 4096 for position, count, _ in whole)
    assert not rest[2] and 0 < rest[1] < 4096 and len(whole) > 10
    behind = writes[writes.index(rest) :]  # by the other lane, once the end of the file has turned direct writing off
    assert all(direct for _, _, direct in set(writes) - set(behind)) and len(behind) <= (1 if workers < 6 else 8)
    assert len(dropped) > 5 and all(count > 0 for count in dropped)


def test_a_long_copy_has_its_room_before_the_first_byte(
    long_copy: TensorPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, blocks = os.pwrite, list[int]()

    def note(descriptor: int, data: Any, position: int) -> int:
        blocks.append(os.fstat(descriptor).st_blocks)
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", note)
    assert right(tmp_path / "out.safetensors", execute(long_copy, tmp_path / "out.safetensors"))
    with (tmp_path / "probe").open("wb") as probe:
        writer._reserve(probe.fileno(), 4096)
        if not os.fstat(probe.fileno()).st_blocks:
            pytest.skip("this file system reserves nothing")
    assert blocks[0] * 512 >= (tmp_path / "out.safetensors").stat().st_size


def test_no_room_for_a_long_copy_leaves_nothing(long_copy: TensorPlan, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(ResourceError, match="the disk is full"):
            execute(long_copy, tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_system_that_takes_no_direct_writes_is_written_as_usual(
    long_copy: TensorPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def picky(descriptor: int, data: Any, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(position)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", picky)
    assert right(tmp_path / "out.safetensors", execute(long_copy, tmp_path / "out.safetensors"))
    assert set(refused) <= {0, 4096}  # the first refusal ends them; two writes are under way at once, in any order


def test_a_write_that_fails_in_its_thread_leaves_nothing(
    long_copy: TensorPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        if position >= 16384:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        execute(long_copy, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_inverse_restores_every_byte(original: Path, tmp_path: Path) -> None:
    plan = plan_of(original)
    execute(plan, tmp_path / "out.safetensors")
    back = plan.rebind(read_header(tmp_path / "out.safetensors")[0]).inverse()
    execute(back, tmp_path / "back.safetensors")
    restored, want = load_file(tmp_path / "back.safetensors"), tensors()
    assert restored.keys() == want.keys()
    for name in want:
        assert restored[name].tobytes() == want[name].tobytes() and restored[name].shape == want[name].shape


def test_apply_agrees_and_leaves_the_input_alone(original: Path) -> None:
    source = {name: torch.from_numpy(array) for name, array in tensors().items()}
    kept = {name: tensor.clone() for name, tensor in source.items()}
    made = apply(plan_of(original), source)
    assert list(made) == list(TARGETS)
    for name, want in expected(source).items():
        assert torch.equal(made[name], want)
    assert source.keys() == kept.keys() and all(torch.equal(source[n], kept[n]) for n in kept)
    with pytest.raises(RecipeError, match="other tensors"):
        apply(plan_of(original), {name: t for name, t in source.items() if name != "a"})
    with pytest.raises(RecipeError, match="a has the wrong shape"):
        apply(plan_of(original), {**source, "a": torch.zeros(4)})
    meta = apply(plan_of(original), {name: t.to("meta") for name, t in source.items()})
    assert {n: tuple(t.shape) for n, t in meta.items()} == {n: t.shape for n, t in TARGETS.items()}


def test_casts_round_as_torch_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "WINDOW", 16)
    source = {n: torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in SHAPES.items()}
    save_torch(source, tmp_path / "in.safetensors")
    plan = plan_of(tmp_path / "in.safetensors", dtype="bf16")
    written = execute(plan, tmp_path / "out.safetensors")
    found, computed = load_torch(tmp_path / "out.safetensors"), apply(plan, source)
    for name, want in expected(source).items():
        assert torch.equal(found[name], want.to(torch.bfloat16)) and torch.equal(computed[name], found[name])
    assert written.bytes < (tmp_path / "in.safetensors").stat().st_size

    # Widening is exact, so its inverse gives the narrow original back bit for bit.
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in source.items()}
    save_torch(narrow, tmp_path / "narrow.safetensors")
    wide = plan_of(tmp_path / "narrow.safetensors", dtype="F32")
    assert wide.exactness == "exact"
    execute(wide, tmp_path / "wide.safetensors")
    back = wide.rebind(read_header(tmp_path / "wide.safetensors")[0]).inverse()
    execute(back, tmp_path / "back.safetensors")
    restored = load_torch(tmp_path / "back.safetensors")
    assert all(torch.equal(restored[n].view(torch.int16), narrow[n].view(torch.int16)) for n in narrow)


def test_mixed_dtypes_stay_aligned(tmp_path: Path) -> None:
    recipe = Recipe("mixed", "a", "b", (Rule("{n:x|y|z}", "{n}"),))
    source = {"x": np.ones(3, np.int8), "y": np.ones(2, np.float64), "z": np.zeros((0, 2), np.float32)}
    save_file(source, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")[0]
    wanted = {name: spec(t.dtype, t.shape, name) for name, t in header.items()}
    execute(compile_recipe(recipe, {}, header, wanted), tmp_path / "out.safetensors")
    out = read_header(tmp_path / "out.safetensors")[0]
    assert out["y"].begin % 8 == 0 and load_file(tmp_path / "out.safetensors")["x"].tolist() == [1, 1, 1]


def listing(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((str(p.relative_to(folder)), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))


def test_existing_output_is_kept(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="the output exists"):
        execute(plan_of(original), tmp_path / "out.safetensors")
    assert listing(tmp_path) == before
    execute(plan_of(original), tmp_path / "out.safetensors", overwrite=True)
    assert load_file(tmp_path / "out.safetensors").keys() == TARGETS.keys()


def test_unwritable_output(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = listing(tmp_path)
    with pytest.raises(ResourceError, match="cannot write") as caught:
        execute(plan_of(original), tmp_path / "file" / "deep" / "out.safetensors")
    assert caught.value.exit_code == 5 and caught.value.hint
    assert listing(tmp_path) == before


def test_failure_takes_new_folders_and_the_partial_file_with_it(original: Path, tmp_path: Path) -> None:
    plan = plan_of(original)
    os.truncate(original, original.stat().st_size - 8)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match="became shorter") as caught:
        execute(plan, tmp_path / "new" / "deep" / "out.safetensors")
    assert str(original) in caught.value.what
    assert listing(tmp_path) == before


def test_no_room(original: Path, tmp_path: Path) -> None:
    """A real refusal by the system in the middle of the file: the process may not write files this large."""
    before = listing(tmp_path)
    done = child(original, tmp_path / "new" / "out.safetensors", "limit")
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1 and "ResourceError" in error and "the disk is full" in error, error
    assert listing(tmp_path) == before


def test_more_than_the_disk_holds(original: Path, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    huge = tmp_path / "huge.safetensors"
    from porter.core.checkpoint import header_bytes

    rows = 2 * free // 1024
    head = header_bytes([spec("U8", (rows, 1024), "w")], {})
    huge.write_bytes(head)
    os.truncate(huge, len(head) + rows * 1024)  # sparse: it takes no room itself
    plan = compile_recipe(
        Recipe("copy", "a", "b", (Rule("w", "w"),)), {}, read_header(huge)[0], specs({"w": (rows, 1024)})
    )
    with pytest.raises(ResourceError, match="not enough space"):
        execute(plan, tmp_path / "new" / "out.safetensors")
    assert not (tmp_path / "new").exists()


def test_a_second_run_on_one_output_is_refused(original: Path, tmp_path: Path) -> None:
    with (tmp_path / ".out.safetensors.partial").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process is writing"):
            execute(plan_of(original), tmp_path / "out.safetensors")
    execute(plan_of(original), tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def child(original: Path, output: Path, mode: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, str(ROOT), str(original), str(output), mode]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_killed_and_run_again(original: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    killed = child(original, output, "hang")
    assert killed.stdout is not None and killed.stdout.readline() == "writing\n", killed.communicate(timeout=5)[1]
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    partial = tmp_path / ".out.safetensors.partial"
    assert partial.stat().st_size > 0
    started = time.monotonic()
    written = execute(plan_of(original), output)
    assert not partial.exists() and time.monotonic() - started < 10
    assert written.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    for name, want in expected(tensors()).items():
        np.testing.assert_array_equal(load_file(output)[name], want)


def test_a_longer_leftover_is_not_mixed_in(original: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.safetensors.partial").write_bytes(b"x" * 100_000)
    written = execute(plan_of(original), tmp_path / "out.safetensors")
    assert written.bytes == (tmp_path / "out.safetensors").stat().st_size < 100_000
    assert load_file(tmp_path / "out.safetensors").keys() == TARGETS.keys()


def test_interrupted_leaves_nothing(original: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        execute(plan_of(original), tmp_path / "out.safetensors", progress=stop)
    assert listing(tmp_path) == before


def test_plans_without_files_cannot_be_executed(tmp_path: Path) -> None:
    for dtype in ("F32", "*"):
        plan = compile_recipe(RECIPE, {}, specs(SHAPES, dtype), TARGETS)
        with pytest.raises(RecipeError, match="is not in a file"):
            execute(plan, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_copying_never_imports_torch(original: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import porter.core.execute as module, porter.core.checkpoint as checkpoint
import conversions.flux1.recipe, conversions.common.autoencoder_kl.recipe
from porter.core.lanes import SOURCE_HASH, Lanes
from porter.core.ops import Cast, Concat, Constant, Offset, Same, Split
from porter.core.recipe import Recipe, Rule, TensorPlan, compile_recipe
header, _ = checkpoint.read_header({str(original)!r})
rules = tuple(Rule(name, name) for name in header)
wanted = {{n: checkpoint.spec("*", t.shape, n) for n, t in header.items()}}
plan = compile_recipe(Recipe("copy", "a", "b", rules), {{}}, header, wanted)
module.execute(plan, {str(tmp_path / "out.safetensors")!r})
print(sorted({{"torch", "numpy", "diffusers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_sources_of_other_dtypes_meet_in_one_target(tmp_path: Path) -> None:
    """Each source is converted from its own dtype; and the way back restores both."""
    b, a = torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16), torch.tensor([0.1, 0.2], dtype=torch.float32)
    save_torch({"a": a, "b": b}, tmp_path / "in.safetensors")
    recipe = Recipe("mixed", "old", "new", (Rule(("b", "a"), "c", (Cast("F32"), Concat())),))
    plan = compile_recipe(recipe, {}, read_header(tmp_path / "in.safetensors")[0], specs({"c": (5,)}))
    execute(plan, tmp_path / "out.safetensors")
    assert torch.equal(load_torch(tmp_path / "out.safetensors")["c"], torch.cat([b.float(), a]))
    back = plan.rebind(read_header(tmp_path / "out.safetensors")[0]).inverse()
    execute(back, tmp_path / "back.safetensors")
    found = load_torch(tmp_path / "back.safetensors")
    assert torch.equal(found["a"], a) and torch.equal(found["b"], b) and found["b"].dtype == torch.bfloat16


def test_rounding_twice_is_refused(tmp_path: Path) -> None:
    save_torch({"a": torch.ones(2)}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")[0]
    twice = Recipe("twice", "old", "new", (Rule("a", "c", (Cast("BF16"), Cast("F32"))),))
    with pytest.raises(RecipeError, match="rounded twice"):
        compile_recipe(twice, {}, header, specs({"c": (2,)}))
    last = Recipe("last", "old", "new", (Rule("a", "c", (Cast("F64"), Cast("BF16"))),))
    assert compile_recipe(last, {}, header, specs({"c": (2,)})).exactness == "lossy"


def test_many_short_runs_read_every_byte_once(tmp_path: Path, monkeypatch: Any) -> None:
    """Rows of several sources in turn: what is read ahead of one is kept while the others are read."""
    parts = {name: np.arange(n, n + 400, dtype=np.int32).reshape(200, 2) for n, name in enumerate("abc")}
    save_file(parts, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")[0]
    plan = compile_recipe(Recipe("t", "a", "b", (Rule(("a", "b", "c"), "d", Concat(1)),)), {}, header)
    count, real = [0], os.preadv

    def counted(descriptor: int, buffers: list[Any], offset: int) -> int:
        count[0] += (got := real(descriptor, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(stream, "WINDOW", 256)
    execute(plan, tmp_path / "out.safetensors")
    np.testing.assert_array_equal(
        load_file(tmp_path / "out.safetensors")["d"], np.concatenate(list(parts.values()), axis=1)
    )
    assert count[0] == plan.bytes_in
    monkeypatch.setattr(stream, "_GAP", 16)  # and a gap is not read
    count[0] = 0
    save_file({"a": np.arange(4000, dtype=np.int32).reshape(100, 40)}, tmp_path / "in.safetensors")
    taken = Recipe("t", "a", "b", (Rule("a", ("x", "y"), Split((2, 38), 1)),))
    cut = compile_recipe(taken, {}, read_header(tmp_path / "in.safetensors")[0])
    execute(cut, tmp_path / "x.safetensors", names=["x"])
    assert count[0] == 100 * 2 * 4


def test_elements_below_a_byte_are_put_together(tmp_path: Path) -> None:
    infos = [spec("F4", (2, 4), "a"), spec("F4", (3, 4), "b")]
    (tmp_path / "in.safetensors").write_bytes(header_bytes(infos, {}) + bytes(range(10)))
    header = read_header(tmp_path / "in.safetensors")[0]
    plan = compile_recipe(Recipe("t", "a", "b", (Rule(("a", "b"), "c", Concat()),)), {}, header)
    execute(plan, tmp_path / "out.safetensors")
    made = read_header(tmp_path / "out.safetensors")[0]
    assert made["c"].shape == (5, 4) and read_bytes(made["c"]) == bytes(range(10))
    execute(plan.rebind(made).inverse(), tmp_path / "back.safetensors")
    back = read_header(tmp_path / "back.safetensors")[0]
    assert [read_bytes(back[name]) for name in "ab"] == [bytes(range(4)), bytes(range(4, 10))]


def test_tensors_without_elements_are_computed(tmp_path: Path) -> None:
    save_file({"a": np.zeros((0, 3), np.float32)}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")[0]
    execute(compile_recipe(Recipe("t", "a", "b", (Rule("a", "b", Offset(1)),)), {}, header), tmp_path / "out")
    assert read_header(tmp_path / "out")[0]["b"].shape == (0, 3)


def test_a_constant_is_checked_in_every_shard(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32), "k": np.full(3, 7, np.float32)}, tmp_path / "in.safetensors")
    recipe = Recipe("t", "a", "b", (Rule("a", "a"), Rule((), "k", Constant(0.5, (3,)))))
    plan = compile_recipe(recipe, {}, specs({"a": (2,)}, "F32"))
    back = plan.rebind(read_header(tmp_path / "in.safetensors")[0]).inverse()
    with pytest.raises(BadInputError, match=r"leave out the constant 0\.5"):
        execute(back, tmp_path / "out.safetensors", names=["a"])


@pytest.mark.parametrize(("other", "equal"), [(-0.0, False), (0.0, True)])
def test_equal_tensors_are_equal_in_every_bit(other: float, equal: bool) -> None:
    recipe = Recipe("t", "a", "b", (Rule(("a", "b"), "c", Same(2)),))
    plan = compile_recipe(recipe, {}, specs({"a": (2,), "b": (2,)}, "F32"))
    given = {"a": torch.tensor([0.0, torch.nan]), "b": torch.tensor([other, torch.nan])}
    if equal:
        assert set(apply(plan, given)) == {"c"}
    else:
        with pytest.raises(RecipeError, match="equal tensors"):
            apply(plan, given)


def test_a_slow_hash_holds_the_reading_back() -> None:
    """Bytes in no buffer of a pool wait for the hash, a few of them and no more."""
    waiting, most, go = [0], [0], threading.Event()

    def slow(data: bytes) -> None:
        go.wait(5)
        waiting[0] -= 1

    with Lanes(2) as lanes:
        threading.Timer(0.2, go.set).start()
        for _ in range(40):
            waiting[0] += 1
            most[0] = max(most[0], waiting[0] if not go.is_set() else 0)
            lanes.feed(SOURCE_HASH, slow, b"")
    assert waiting[0] == 0 and 1 < most[0] <= 8
