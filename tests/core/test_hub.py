"""The hub over real HTTP: what is read of a repository, by which requests, and what every failure says.

Environment variables are read when huggingface_hub is imported, so the questions are asked by processes of their own.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from porter import builtin
from porter.core.errors import AccessError, BadInputError, CheckpointError, MissingError, UsageError
from porter.core.source import open_source
from tests.hub_server import COMMIT, TOKEN, Fault, HubServer, hub_server

TINY = builtin.locate("tiny-flux")
SECOND = "decade" + "1" * 34

PROBE = """
import json, sys, time
from porter.core.source import open_source
from porter.core.errors import PorterError
answers = []
for model, options, names in json.load(sys.stdin):
    began, out = time.monotonic(), {}
    try:
        source = open_source(model, **options)
        out = {"kind": source.kind, "revision": source.revision, "declared": dict(source.declared),
               "files": {name: [info.size, info.sha256] for name, info in source.files.items()}}
        for name in names:
            if name.endswith(".json"):
                out[name] = source.json(name)
            else:
                header, metadata = source.header(name)
                out[name] = [{k: [t.dtype, list(t.shape), t.begin, t.end] for k, t in header.items()}, metadata]
    except PorterError as error:
        out = {"error": type(error).__name__, "code": error.exit_code, "text": str(error)}
    answers.append({**out, "seconds": time.monotonic() - began})
print(json.dumps(answers))
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
try:
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < 150_000, f"{peak} kB"
except OSError:
    pass
"""


def environment(server: HubServer | None, home: Path, **more: str) -> dict[str, str]:
    """Nothing of this machine's hub settings; `server` as the hub and `home` as its cache."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    place = server.url if server else "http://127.0.0.1:9"
    return {**clean, "HF_HOME": str(home), "HF_ENDPOINT": place, "PYTHONPATH": str(Path.cwd()), **more}


def ask_all(questions: list[tuple[str, dict[str, Any], list[str]]], env: dict[str, str]) -> list[dict[str, Any]]:
    """What one fresh process finds, question by question."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, input=json.dumps(questions), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ask(
    server: HubServer | None, home: Path, model: str, *read: str, env: dict[str, str] | None = None, **options: object
) -> dict[str, Any]:
    """What a fresh process finds at `model`."""
    return ask_all([(model, options, list(read))], environment(server, home, **(env or {})))[0]


def model_requests(server: HubServer) -> list[str]:
    """Paths that were asked for; huggingface_hub asks others for its own sake."""
    return [path for _, path, _ in server.requests if "acme/" in path]


def refused(server: HubServer | None, home: Path, *read: str, model: str = "acme/tiny", **options: Any) -> dict:
    found = ask(server, home, model, *read, **options)
    assert "error" in found, found
    assert "next:" in found["text"]
    return found


def planned(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`porter plan` as a user runs it."""
    command = [sys.executable, "-m", "porter.cli", "plan", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.returncode != 7, done.stderr
    return done


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    repository(tmp_path / "hub" / "acme" / "tiny")
    with hub_server(tmp_path / "hub") as running:
        yield running


def repository(folder: Path) -> Path:
    assert TINY is not None
    folder.mkdir(parents=True)
    for name in ("model_index.json", "ae.safetensors"):
        shutil.copy(TINY / name, folder / name)
    return folder


def test_headers_by_range_only(server: HubServer, tmp_path: Path) -> None:
    assert TINY is not None
    found = ask(server, tmp_path / "home", "acme/tiny", "model_index.json", "ae.safetensors")
    assert (found["kind"], found["revision"]) == ("hub", COMMIT)
    assert found["declared"] == {"license": "apache-2.0"}
    assert found["model_index.json"] == json.loads((TINY / "model_index.json").read_text())
    local, metadata = open_source(TINY).header("ae.safetensors")
    assert found["ae.safetensors"][0] == {k: [t.dtype, list(t.shape), t.begin, t.end] for k, t in local.items()}
    assert found["ae.safetensors"][1] == metadata
    asked = [headers.get("range") for _, path, headers in server.requests if "ae.safetensors" in path]
    assert asked == ["bytes=0-131071"] * 2  # the hub, and where it redirects to
    cached = [path.name for path in (tmp_path / "home" / "hub").rglob("*") if path.is_symlink()]
    assert cached == ["model_index.json"]


def test_a_header_longer_than_the_first_read(server: HubServer, tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    tensors = {f"a.very.long.name.of.a.tensor.in.block.{i}.weight": numpy.zeros(1, "uint8") for i in range(1800)}
    save_file(tensors, server.root / "acme" / "tiny" / "long.safetensors")
    found = ask(server, tmp_path / "home", "acme/tiny", "long.safetensors")
    assert set(found["long.safetensors"][0]) == set(tensors)


def test_branches_tags_commits_and_their_beginnings(server: HubServer, tmp_path: Path) -> None:
    server.push("acme/tiny", SECOND, **{"new.json": "{}"})
    server.refs["acme/tiny"] |= {"refs/pr/1": SECOND, "v1.0": COMMIT}
    revisions = {None: SECOND, "main": SECOND, "refs/pr/1": SECOND, "v1.0": COMMIT, COMMIT: COMMIT, "c0ffee00": COMMIT}
    questions = [("acme/tiny", {"revision": given}, ["model_index.json"]) for given in revisions]
    home = tmp_path / "home"
    for found, commit in zip(ask_all(questions, environment(server, home)), revisions.values(), strict=True):
        assert found["revision"] == commit and ("new.json" in found["files"]) == (commit == SECOND), found
    # The same, with nothing but what that left behind.
    offline = [(model, {**options, "offline": True}, names) for model, options, names in questions]
    for found, commit in zip(ask_all(offline, environment(None, home)), revisions.values(), strict=True):
        assert found["revision"] == commit and ("new.json" in found["files"]) == (commit == SECOND), found
    strange = ["../../x", "/etc", "a..b", "-x", "a b", "", "a\\b", "x" * 300, "a\nb", "main/"]
    for found in ask_all([("acme/tiny", {"revision": given}, []) for given in strange], environment(server, home)):
        assert found["code"] == UsageError.exit_code and "no branch, tag or commit" in found["text"], found
    assert refused(server, home, revision="v9")["code"] == MissingError.exit_code
    assert "has no revision v9" in refused(server, home, revision="v9")["text"]


def test_a_push_in_between_changes_nothing(server: HubServer, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    def push() -> None:
        server.push("acme/tiny", SECOND, **{"model_index.json": '{"_class_name": "Other"}'})
        save_file({}, server.root / "acme" / "tiny" / "ae.safetensors")

    server.then = [push]
    found = ask(server, tmp_path / "home", "acme/tiny", "model_index.json", "ae.safetensors")
    assert found["revision"] == COMMIT and found["model_index.json"]["_class_name"] == "FluxPipeline"
    assert len(found["ae.safetensors"][0]) > 100
    later = ask(server, tmp_path / "home", "acme/tiny", "model_index.json")
    assert later["revision"] == SECOND and later["model_index.json"]["_class_name"] == "Other"


def test_what_the_card_declares(server: HubServer, tmp_path: Path) -> None:
    server.cards["acme/tiny"] = {
        "license": "other", "license_name": "dev-licence", "license_link": "LICENSE.md", "base_model": ["a/b"],
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["x"], "widget": 3,
    }  # fmt: skip
    server.gated.add("acme/tiny")
    found = ask(server, tmp_path / "home", "acme/tiny")
    wanted = {key: value for key, value in server.cards["acme/tiny"].items() if key not in ("tags", "widget")}
    assert found["declared"] == {**wanted, "gated": "manual"}
    assert ask(None, tmp_path / "home", "acme/tiny", offline=True)["declared"] == found["declared"]
    server.cards["acme/tiny"] = {"license": ["mit", 3, "apache-2.0"], "base_model": {"a": 1}, "library_name": [[]]}
    assert ask(server, tmp_path / "new", "acme/tiny")["declared"] == {"license": "mit, apache-2.0", "gated": "manual"}


def test_the_token_goes_to_the_hub_and_nowhere_else(server: HubServer, tmp_path: Path) -> None:
    """Storage has another name, and `other` another port of the same name."""
    server.private.add("acme/tiny")
    found = ask(server, tmp_path / "home", "acme/tiny", "ae.safetensors", "model_index.json", token=TOKEN)
    assert "error" not in found, found
    by_host: dict[str, set[bool]] = {}
    for headers in (headers for _, path, headers in server.requests if "acme/tiny" in path):
        by_host.setdefault(headers["host"].split(":")[0], set()).add("authorization" in headers)
    assert by_host == {"127.0.0.1": {True}, "localhost": {False}}
    with hub_server(server.root) as other:
        for on, name, place in (
            ("info", "1", "/api/models/acme/tiny?blobs=true"),
            ("file", "2", f"/storage/acme/tiny/{COMMIT}/ae.safetensors"),
            ("file", "3", f"/acme/tiny/resolve/{COMMIT}/model_index.json"),
        ):
            repository(server.root / "acme" / name)
            server.faults[f"acme/{name}"] = Fault(on, status=302, headers={"Location": other.url + place})
            read = [] if on == "info" else [place.rsplit("/", 1)[1]]
            found = ask(server, tmp_path / "home", f"acme/{name}", *read, env={"HF_TOKEN": TOKEN})
            assert "error" not in found, found
        assert len(other.requests) >= 3
        assert not [asked for asked in other.requests if "authorization" in asked[2]]
    assert [True for _, path, headers in server.requests if "acme/2/resolve" in path and "authorization" in headers]


def test_private_gated_and_missing(server: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    gone = refused(server, home, model="acme/none")
    assert gone["code"] == MissingError.exit_code and "neither a path here nor a repository" in gone["text"]
    server.gated.add("acme/tiny")
    for name in ("ae.safetensors", "model_index.json"):
        for token, words in ((None, "no valid token was sent"), ("hf_other", "this token has no access")):
            gated = refused(server, home, name, token=token)
            assert gated["code"] == AccessError.exit_code and words in gated["text"], gated
            assert "accept the terms on the page of acme/tiny" in gated["text"]
    server.private.add("acme/tiny")
    private = refused(server, home)
    assert private["code"] == AccessError.exit_code and "auth login" in private["text"]
    assert refused(server, home, token="hf_wrong")["code"] == AccessError.exit_code
    assert "error" not in ask(server, home, "acme/tiny", "ae.safetensors", token=TOKEN)


def test_a_server_that_ignores_ranges_is_refused(server: HubServer, tmp_path: Path) -> None:
    server.no_ranges = True
    os.truncate(server.root / "acme" / "tiny" / "ae.safetensors", 1 << 33)
    found = refused(server, tmp_path / "home", "ae.safetensors")
    assert found["code"] == MissingError.exit_code and "206" in found["text"]
    assert server.sent < 8 << 20


def test_gguf_and_torch_files_by_range(server: HubServer, tmp_path: Path) -> None:
    """Their descriptions only: 4 GB of data lie behind them, which are never sent."""
    import torch

    from tests.core.test_formats import gguf

    folder = server.root / "acme" / "tiny"
    names = [(f"blocks.{i}.attn.to_q.weight", (1024, 1024), 1, 1 << 21) for i in range(2048)]
    (folder / "m.gguf").write_bytes(gguf(names, data=0))
    os.truncate(folder / "m.gguf", (folder / "m.gguf").stat().st_size + (1 << 32))
    state = {f"blocks.{i}.weight": torch.zeros(300, 300) for i in range(40)}
    torch.save(state, folder / "new.ckpt")
    torch.save({"state_dict": state}, folder / "old.bin", _use_new_zipfile_serialization=False)
    os.truncate(folder / "old.bin", 1 << 32)
    wanted = ["m.gguf", "new.ckpt", "old.bin"]
    found = ask(server, tmp_path / "home", "acme/tiny", *wanted)
    assert "error" not in found, found
    assert {name: info[1] for name, info in found["m.gguf"][0].items()} == {row[0]: [1024, 1024] for row in names}
    for name in ("new.ckpt", "old.bin"):
        assert {key: info[:2] for key, info in found[name][0].items()} == {key: ["F32", [300, 300]] for key in state}
        assert found[name][1]["pickled"] == "true"
    assert server.sent < 1 << 20, server.sent
    assert ask(None, tmp_path / "home", "acme/tiny", *wanted, offline=True)["m.gguf"] == found["m.gguf"]


def test_remote_files_that_break_their_format(server: HubServer, tmp_path: Path) -> None:
    folder = server.root / "acme" / "tiny"
    bad = {
        "bad.safetensors": b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 9,
        "empty.safetensors": b"",
        "short.safetensors": b"123",
        "huge.safetensors": (90 << 20).to_bytes(8, "little") + b"{" + b" " * 100,
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "bad.gguf": b"GGUF" + b"\3\0\0\0" + b"\xff" * 16 + b"\0" * 100,
        "text.ckpt": b"\x80\x02junk" + b"\0" * 300_000,
        "zip.pt": b"PK\3\4" + b"\0" * 300_000,
        "end.pt": b"PK\3\4" + b"\0" * 200_000 + b"PK\5\6" + b"\xff" * 18,
    }
    for name, raw in bad.items():
        (folder / name).write_bytes(raw)
    os.truncate(folder / "huge.safetensors", 1 << 30)
    questions: list[tuple[str, dict[str, Any], list[str]]] = [("acme/tiny", {}, [name]) for name in bad]
    for name, found in zip(bad, ask_all(questions, environment(server, tmp_path / "home")), strict=True):
        assert found.get("code") == CheckpointError.exit_code and name in found["text"], (name, found)
    assert server.sent < 3 << 20


# Servers that fail.


@dataclass(frozen=True)
class Case:
    """Asking a repository whose server has `fault` for `read` ends in `code`, with all of `words` in the message."""

    fault: Fault
    words: tuple[str, ...]
    code: int = MissingError.exit_code
    read: str | None = None
    absent: str = "cannot be reached"


def edited(**changes: Any) -> Fault:
    return Fault(change=lambda document: {**document, **changes})


def files(*entries: object) -> Fault:
    return edited(siblings=list(entries))


def entry(name: object = "a.json", size: object = 2, **more: object) -> dict[str, object]:
    return {"rfilename": name, "size": size, **more}


def on_file(words: str, code: int = 4, **how: Any) -> Case:
    return Case(Fault("file", **how), (words,), code, "model_index.json")


def on_range(words: str, code: int = 4, **how: Any) -> Case:
    return Case(Fault("storage", **how), (words,), code, "ae.safetensors")


def listing(words: str, fault: Fault) -> Case:
    return Case(fault, ("acme/", words), BadInputError.exit_code)


LATER = {"Retry-After": "3600"}
LOOP = {"Location": "?again"}
BOMB = gzip.compress(b" " * 200_000_000)
CASES = {
    "limited": Case(Fault(status=429, headers=LATER), ("limits how often", "wait 3600 seconds", "hf auth login")),
    "limited-by-hub": Case(Fault(status=429, headers={"RateLimit": '"api";r=0;t=55'}), ("wait 55 seconds",)),
    "limited-until": Case(Fault(status=429, headers={"Retry-After": "Wed, 21 Oct 2026"}), ("until Wed, 21 Oct 2026",)),
    "limited-badly": Case(Fault(status=429, headers={"Retry-After": "²³" + "9" * 90}), ("limits how often",)),
    "error-500": Case(Fault(status=500), ("the hub failed", "HTTP 500", "try again in a minute")),
    "error-503": Case(Fault(status=503, headers=LATER), ("the hub failed", "HTTP 503")),
    "error-408": Case(Fault(status=408), ("the hub failed", "HTTP 408")),
    "error-400": Case(Fault(status=400), ("the hub refused", "HTTP 400")),
    "error-403": Case(Fault(status=403), ("may not be read", "hf auth whoami"), 3),
    "error-401": Case(Fault(status=401), ("private, gated or does not exist",), 3),
    "error-451": Case(Fault(status=451), ("the hub refused", "HTTP 451")),
    "drips": Case(Fault(drip=0.1), ("too slow", "HF_HUB_DOWNLOAD_TIMEOUT")),
    "drips-head": Case(Fault(drip_head=0.1), ("too slow",)),
    "silent": Case(Fault(drip_head=60), ("too slow",)),
    "cut": Case(Fault(cut=50), ("cannot be used",)),
    "loop": Case(Fault(status=302, headers=LOOP), ("cannot be used", "redirects")),
    "to-a-file": Case(Fault(status=302, headers={"Location": "file:///etc/passwd"}), ("file://",), absent="root:"),
    "to-nowhere": Case(Fault(status=302, headers={"Location": "http://[x"}), ("acme/",), absent="Traceback"),
    "html": listing("JSON", Fault(body=b"<html>log in</html>")),
    "half-json": listing("JSON", Fault(body=b'{"id": "a')),
    "deep": listing("RecursionError", Fault(body=b"[" * 200_000)),
    "a-list": listing("file list", Fault(body=b"[]")),
    "null": listing("file list", Fault(body=b"null")),
    "no-id": listing("file list", Fault(body=b"{}")),
    "endless": listing("endless", Fault(pieces=b" " * 65536)),
    "many-values": listing("endless", Fault(pieces=b"[[],{}," * 9000)),
    "bomb": listing("endless", Fault(headers={"Content-Encoding": "gzip"}, body=BOMB)),
    "damaged-gzip": Case(Fault(headers={"Content-Encoding": "gzip"}), ("damaged",)),
    "brotli": Case(Fault(headers={"Content-Encoding": "br"}), ("encoding br",)),
    "no-sha": listing("sha", edited(sha=None)),
    "a-branch-as-sha": listing("sha", edited(sha="main")),
    "a-path-as-sha": listing("sha", edited(sha="../" * 13 + "x")),
    "no-files": listing("siblings", edited(siblings=None)),
    "empty": listing("siblings", edited(siblings=[])),
    "files-as-table": listing("file list", edited(siblings={"a": 1})),
    "file-as-word": listing("file list", files("a.json")),
    "up": listing("../x", files(entry("../x"))),
    "up-inside": listing("a/../../x", files(entry("a/../../x"))),
    "absolute": listing("/etc/passwd", files(entry("/etc/passwd"))),
    "drive": listing("C:/x", files(entry("C:/x"))),
    "backslash": listing("names of files", files(entry("..\\x"))),
    "control": listing("\\x1b", files(entry("a\x1b[31m.json"))),
    "newline": listing("names of files", files(entry("a\nb"))),
    "double-slash": listing("a//b", files(entry("a//b"))),
    "surrogate": listing("names of files", files(entry("a\ud800"))),
    "long-name": listing("names of files", files(entry("x" * 300))),
    "number-as-name": listing("file list", files(entry(3))),
    "twice": listing("a.json twice", files(entry(), entry())),
    "negative": listing("size of a.json", files(entry(size=-1))),
    "word-as-size": listing("size of a.json", files(entry(size="10"))),
    "no-size": listing("size of a.json", files(entry(size=None))),
    "true-as-size": listing("size of a.json", files(entry(size=True))),
    "fraction": listing("size of a.json", files(entry(size=1e3))),
    "beyond": listing("size of a.json", files(entry(size=2**70))),
    "half-lfs": listing("file list", files(entry(lfs={"size": 3}))),
    "word-as-lfs": listing("file list", files(entry(lfs="x"))),
    "short-hash": listing("sha256 of a.json", files(entry(lfs={"sha256": "abc", "size": 3, "pointerSize": 1}))),
    "too-many": listing("at most 20000", files(*(entry(str(i)) for i in range(20_001)))),
    "file-limited": on_file("wait 3600 seconds", status=429, headers=LATER),
    "file-get-limited": on_file("wait 3600 seconds", status=429, headers=LATER, method="GET"),
    "file-503": on_file("the hub failed", status=503),
    "file-get-503": on_file("the hub failed", status=503, method="GET"),
    "file-gone": on_file("no longer serves", status=404, headers={"X-Error-Code": "EntryNotFound"}),
    "file-cut": on_file("acme/", cut=10, method="GET"),
    "file-drips": on_file("too slow", drip=0.1, method="GET"),
    "file-loop": on_file("redirects", status=302, headers=LOOP),
    "file-without-commit": on_file("x-repo-commit", 6, headers={"X-Repo-Commit": ""}),
    "file-of-another": on_file("another commit", headers={"X-Repo-Commit": SECOND}),
    "file-from-outside": on_file("x-repo-commit", 6, headers={"X-Repo-Commit": "../../../x"}),
    "file-hash-outside": on_file("etag", 6, headers={"ETag": '"../../../../x"'}),
    "file-link-outside": on_file("x-linked-etag", 6, headers={"X-Linked-Etag": '"../../../../x"'}),
    "file-without-hash": on_file("etag", 6, headers={"ETag": ""}),
    "file-no-json": on_file("not valid JSON", 6, body=b"{"),
    "file-endless": on_file("endless", 6, pieces=b" " * 65536, method="GET"),
    "file-too-large": Case(
        files(entry("model_index.json", 17 << 20)), ("too large", "not downloaded"), 6, "model_index.json"
    ),
    "range-limited": on_range("wait 3600 seconds", status=429, headers=LATER),
    "range-503": on_range("the hub failed", status=503),
    "range-403": on_range("may not be read", 3, status=403),
    "range-404": on_range("acme/", status=404),
    "range-416": on_range("the hub refused", status=416),
    "range-cut": on_range("100 bytes of", cut=100),
    "range-drips": on_range("too slow", drip=0.1),
    "range-drips-head": on_range("too slow", drip_head=0.1),
    "range-fewer": on_range("arrived", more=-5),
    "range-more": on_range("more than", more=5),
    "range-another": on_range("bytes 0-1/2", headers={"Content-Range": "bytes 0-1/2"}),
    "range-whole": on_range("206", status=200),
    "range-gzip": on_range("gzip", headers={"Content-Encoding": "gzip"}),
    "range-loop": on_range("redirects without end", status=302, headers=LOOP),
    "range-to-a-file": on_range("a redirect to file:", status=302, headers={"Location": "file:///etc/passwd"}),
    "range-to-ftp": on_range("a redirect to ftp:", status=307, headers={"Location": "ftp://localhost/x"}),
    "range-to-nowhere": on_range("acme/", status=302, headers={"Location": "http://[x"}),
    "range-to-nothing": on_range("HTTP 302", status=302),
}  # fmt: skip


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case ends in: all in one process, whose memory is bounded and whose sockets may be silent for 1 s."""
    root = tmp_path_factory.mktemp("failures")
    for name in CASES:
        repository(root / "hub" / "acme" / name)
    with hub_server(root / "hub") as server:
        server.faults = {f"acme/{name}": case.fault for name, case in CASES.items()}
        questions = [(f"acme/{name}", {}, [case.read] if case.read else []) for name, case in CASES.items()]
        env = environment(server, root / "home", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
        return dict(zip(CASES, ask_all(questions, env), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_server_that_fails(failures: dict[str, dict[str, Any]], name: str) -> None:
    case, found = CASES[name], failures[name]
    assert found.get("code") == case.code, found
    for words in (*case.words, "expected:", "found:", "next:"):
        assert words in found["text"], found
    assert case.absent not in found["text"], found
    assert found["seconds"] < 5, found


@pytest.mark.parametrize(("fault", "code", "words"), [
    (Fault(status=429, headers=LATER), 4, "wait 3600 seconds"),
    (Fault("file", status=429, headers=LATER), 4, "wait 3600 seconds"),
    (Fault("file", status=502), 4, "HTTP 502"),
    (Fault("storage", status=503), 4, "HTTP 503"),
    (edited(sha="x"), 6, "sha"),
])  # fmt: skip
def test_the_whole_command_ends_soon(server: HubServer, tmp_path: Path, fault: Fault, code: int, words: str) -> None:
    server.faults["acme/tiny"] = fault
    began = time.monotonic()
    done = planned(environment(server, tmp_path / "home"), "acme/tiny")
    assert done.returncode == code and words in done.stderr and "next:" in done.stderr, done.stderr
    assert time.monotonic() - began < 20 and not done.stdout


@pytest.mark.parametrize("place", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense", "http://[x"])
def test_unreachable(tmp_path: Path, place: str) -> None:
    done = planned(environment(None, tmp_path / "home", HF_ENDPOINT=place), "acme/tiny")
    assert done.returncode == 4 and "cannot be reached" in done.stderr and "HF_ENDPOINT" in done.stderr, done.stderr


def test_a_cache_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    done = planned(environment(server, tmp_path / "home"), "acme/tiny")
    assert done.returncode == 5 and "cache cannot be written" in done.stderr and "HF_HOME" in done.stderr, done.stderr


# Offline.


def test_offline_after_a_plan_gives_the_same_plan(server: HubServer, tmp_path: Path) -> None:
    """Also by HF_HUB_OFFLINE, at a branch, and for the headers of files that were never downloaded."""
    home, read = tmp_path / "home", ["model_index.json", "ae.safetensors"]
    found = ask(server, home, "acme/tiny", *read)
    for options in ({"offline": True}, {"env": {"HF_HUB_OFFLINE": "1"}}, {"offline": True, "revision": COMMIT}):
        again = ask(None, home, "acme/tiny", *read, **options)  # type: ignore[arg-type]
        assert {**again, "seconds": 0} == {**found, "seconds": 0}
    asked = len(model_requests(server))
    assert {**ask(server, home, "acme/tiny", *read), "seconds": 0} == {**found, "seconds": 0}
    assert len(model_requests(server)) == asked + 1  # only where the branch stands now
    online = planned(environment(server, home), "acme/tiny", "--json")
    offline = planned(environment(None, home), "acme/tiny", "--json", "--offline")
    assert online.returncode == offline.returncode == 0 and online.stdout == offline.stdout, offline.stderr
    told = refused(None, home)["text"]
    assert "cannot be reached" in told and "porter plan acme/tiny --offline" in told
    nowhere = environment(None, tmp_path / "nothing")
    assert "leave out --offline" in planned(nowhere, "acme/tiny", "--offline").stderr
    assert "unset HF_HUB_OFFLINE" in planned(nowhere | {"HF_HUB_OFFLINE": "1"}, "acme/tiny").stderr
    assert "--offline" not in refused(None, tmp_path / "empty")["text"]
    assert "--offline" not in refused(None, home, revision="v7")["text"]


def test_offline_with_nothing_or_with_another_commit(server: HubServer, tmp_path: Path) -> None:
    nothing = refused(None, tmp_path / "empty", offline=True)
    assert nothing["code"] == MissingError.exit_code and "not in the hub's cache" in nothing["text"]
    ask(server, tmp_path / "home", "acme/tiny")
    other = refused(None, tmp_path / "home", offline=True, revision="v9")
    assert other["code"] == MissingError.exit_code and "only the commits c0ffee000000" in other["text"]
    file = refused(None, tmp_path / "home", "ae.safetensors", offline=True)  # never asked for online
    assert file["code"] == MissingError.exit_code and f"ae.safetensors --revision {COMMIT}" in file["text"]


def test_what_another_program_downloaded_works_offline(server: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys; from huggingface_hub import snapshot_download as get; get('acme/tiny', allow_patterns=sys.argv[1])"
    )
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-c", code, "*.json"], env=environment(server, home), check=True)
    found = ask(None, home, "acme/tiny", "model_index.json", offline=True)
    assert (found["revision"], list(found["files"])) == (COMMIT, ["model_index.json"])
    (server.root / "acme" / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    server.refs["acme/tiny"] = {"main": SECOND}
    subprocess.run([sys.executable, "-c", code, "*"], env=environment(server, home), check=True)
    found = ask(None, home, "acme/tiny", "ae.safetensors", offline=True)
    assert found["revision"] == SECOND and found["declared"] == {"license": "mit"} and found["ae.safetensors"]


@pytest.mark.parametrize("ref", ["../../../etc", "main", "", "g" * 40, COMMIT + "/..", "\0", COMMIT[:20]])
def test_a_ref_of_the_cache_that_names_no_commit(tmp_path: Path, ref: str) -> None:
    refs = tmp_path / "home" / "hub" / "models--acme--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(ref)
    found = refused(None, tmp_path / "home", offline=True)
    assert found["code"] == BadInputError.exit_code and "names no commit" in found["text"]


def test_notes_that_somebody_spoiled_count_as_none(server: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    found = ask(server, home, "acme/tiny", "ae.safetensors")
    notes = home / "assets" / "porter" / "acme--tiny" / COMMIT
    written = [path for path in notes.iterdir() if path.name != "listing.json"]
    spoilers: list[Callable[[Any], object]] = [
        lambda _: 3,
        lambda document: {**document, "tensors": [["a", "F32", [-1], 0, 4]]},
        lambda document: {**document, "tensors": [["a", "F32", [1], 0]]},
        lambda document: {**document, "tensors": [], "name": "other"},
        lambda document: {**document, "tensors": [], "size": 1},
        lambda document: {**document, "tensors": [], "schema": "porter.hub/9"},
    ]
    good = json.loads(written[0].read_text())
    for spoil in spoilers:
        written[0].write_text(json.dumps(spoil(good)))
        assert {**ask(server, home, "acme/tiny", "ae.safetensors"), "seconds": 0} == {**found, "seconds": 0}
    (notes / "listing.json").write_text("{")
    assert refused(None, home, offline=True)["code"] == MissingError.exit_code


@pytest.mark.parametrize(("fault", "words"), [
    (Fault("storage", status=500), "the hub failed"),
    (Fault("file", status=302, headers={"Location": "file:///etc/passwd"}), "cannot be used"),
    (Fault("storage", status=404), "no longer serves a file that it lists"),
])  # fmt: skip
def test_what_fails_after_the_file_list(server: HubServer, tmp_path: Path, fault: Fault, words: str) -> None:
    """The file list alone answers no plan, so nobody is sent to --offline, this time or the next."""
    server.faults["acme/tiny"] = fault
    found = refused(server, tmp_path / "home", "ae.safetensors")
    assert words in found["text"] and "--offline" not in found["text"], found
    assert "neither a path" not in found["text"]
    server.faults["acme/tiny"] = Fault(status=500)
    assert "--offline" not in refused(server, tmp_path / "home")["text"]
    del server.faults["acme/tiny"]
    assert "error" not in ask(server, tmp_path / "home", "acme/tiny", "ae.safetensors")
    server.faults["acme/tiny"] = Fault(status=500)
    assert "--offline" in refused(server, tmp_path / "home")["text"]


@pytest.mark.parametrize("token", ["secret\nline", "secret word", "secr\u00e9t", "secret\x1b", ""])
def test_a_token_that_is_none_is_not_shown(server: HubServer, tmp_path: Path, token: str) -> None:
    found = refused(server, tmp_path / "home", token=token)
    assert found["code"] == UsageError.exit_code and "--token" in found["text"]
    assert "secr" not in found["text"] and not server.requests
