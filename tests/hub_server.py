"""A hub on this machine: the endpoints that porter uses, served over real HTTP from a folder of files.

Repositories are folders `<root>/<owner>/<name>`. What a test wants to go wrong is set on the server object:
`private` (401), `gated` (403 with the hub's error code on downloads), `broken` (500), `no_ranges` (200 with all bytes),
and for everything else a `Fault` in `faults[repository]`. Large files are redirected to another host name, as the hub
does with its storage. They may be sparse and of any size: only what is asked for is read, and their hashes are made up.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_right"
LARGE = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".ckpt")
MAX_HASHED = 1 << 26


@dataclass
class Fault:
    """How the answers of one kind go wrong.

    Attributes:
        on: `info` (the file list), `file` (the hub's own address of a file) or `storage` (where it redirects to).
        status, headers, body: sent instead of, or beside, the right ones.
        cut: the connection ends after so many bytes of the body.
        drip: seconds before each single byte of the body.
        drip_head: the same for the head, which then never ends.
        pieces: endless chunks of this are sent, without a length.
        change: takes the JSON document of the file list, and gives the one to send.
        more: so many bytes more than asked for (negative: fewer), with an honest length.
        method: only for this method.
    """

    on: str = "info"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    drip: float | None = None
    drip_head: float | None = None
    pieces: bytes | None = None
    change: Callable[[dict[str, Any]], object] | None = None
    more: int = 0
    method: str | None = None


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: (method, path, headers with lower-case names) of everything that was asked.
        sent: bytes that left it, heads included.
        refs: repository → branch or tag → commit.
        then: what happens right after the next file list was sent.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.broken = False
        self.no_ranges = False
        self.faults: dict[str, Fault] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent = 0
        self.then: list[Callable[[], None]] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """The same server under another name: what the redirects point to."""
        return f"http://localhost:{self.server_port}"

    def push(self, repo: str, commit: str, **files: str) -> None:
        """A new commit on main: what the folder holds now stays reachable by its own commit."""
        refs = self.refs.setdefault(repo, {"main": COMMIT})
        shutil.copytree(self.root / repo, self.root / ".old" / refs["main"] / repo)
        refs["main"] = commit
        for name, text in files.items():
            (self.root / repo / name).write_text(text)

    def commit(self, repo: str, revision: str | None) -> str | None:
        """The commit that a branch, tag, commit or the beginning of one names."""
        refs = self.refs.get(repo, {"main": COMMIT})
        if revision is None or revision in refs:
            return refs[revision or "main"]
        known = {*refs.values(), *(path.name for path in (self.root / ".old").glob("*"))}
        begun = [commit for commit in known if commit.startswith(revision)]
        return begun[0] if len(revision) >= 7 and len(begun) == 1 else None

    def folder(self, repo: str, commit: str) -> Path:
        at_main = commit == self.refs.get(repo, {"main": COMMIT})["main"]
        return self.root / repo if at_main else self.root / ".old" / commit / repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are what many tests are about."""


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def digest(file: Path) -> str:
    """The sha256 of a file; for one too large to read, one that is made up."""
    if file.stat().st_size > MAX_HASHED:
        return hashlib.sha256(f"{file.name} {file.stat().st_size}".encode()).hexdigest()
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Counting:
    """What the handler writes to, counted."""

    def __init__(self, file: BinaryIO, server: HubServer) -> None:
        self.file, self.server = file, server

    def write(self, data: bytes) -> int:
        self.server.sent += len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def setup(self) -> None:
        super().setup()
        self.wfile = _Counting(self.wfile, self.server)  # type: ignore[assignment]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        kind = {"api": "info", "storage": "storage"}.get(parts[0], "file")
        repo = "/".join(parts[2:4] if kind == "info" else parts[1:3] if kind == "storage" else parts[:2])
        fault = hub.faults.get(repo)
        wanted = fault and fault.on == kind and fault.method in (None, self.command)
        self.fault = fault if wanted else None
        if parts[:2] != ["api", "models"] and kind == "info":
            self._send(404, b"")  # what huggingface_hub asks for its own sake
        elif hub.broken:
            self._send(500, b"broken")
        elif kind == "info" and parts[4:5] == ["tree"]:
            self._tree(repo, parts[5])
        elif kind == "info":
            self._info(repo, parts[5] if len(parts) > 5 else None)
            if hub.then:
                hub.then.pop()()
        elif kind == "storage":
            self._file(hub.folder(repo, parts[3]).joinpath(*parts[4:]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(repo, parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _allowed(self, repo: str, *, download: bool) -> bool:
        given = self.headers.get("Authorization")
        authorised = given == f"Bearer {TOKEN}"
        if repo in self.server.private and not authorised:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return False
        if repo in self.server.gated and download and not authorised:
            status = 403 if given else 401
            self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return False
        return True

    def _tree(self, repo: str, revision: str) -> None:
        """What `snapshot_download` asks for."""
        commit = self.server.commit(repo, revision) or COMMIT
        folder, rows = self.server.folder(repo, commit), []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = file.stat().st_size
            row: dict[str, object] = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": size}
            row["oid"] = digest(file)[:40]
            if file.suffix in LARGE:
                row["lfs"] = {"oid": digest(file), "size": size, "pointerSize": 130}
            rows.append(row)
        self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def _info(self, repo: str, revision: str | None) -> None:
        if not self._allowed(repo, download=False):
            return
        if not (self.server.root / repo).is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.server.commit(repo, revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        folder, siblings = self.server.folder(repo, commit), []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry: dict[str, object] = {"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
            if file.suffix in LARGE:
                entry["lfs"] = {"sha256": digest(file), "size": file.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        document: dict[str, Any] = {
            "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [],
            "private": repo in self.server.private, "gated": "manual" if repo in self.server.gated else False,
            "cardData": self.server.cards.get(repo, {"license": "apache-2.0"}),
        }  # fmt: skip
        sent = self.fault.change(document) if self.fault and self.fault.change else document
        # An entity tag as the hub's own framework writes it.
        self._send(200, json.dumps(sent).encode(), {"Content-Type": "application/json", "ETag": 'W/"1f-a/b+c/="'})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not self._allowed(repo, download=True):
            return
        commit = self.server.commit(repo, revision)
        file = self.server.folder(repo, commit or COMMIT) / name
        if commit is None or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if file.suffix in LARGE:
            size = str(file.stat().st_size)
            headers = {"X-Linked-Size": size, "X-Linked-Etag": f'"{digest(file)}"', "X-Repo-Commit": commit}
            self._send(302, b"", {**headers, "Location": f"{self.server.storage}/storage/{repo}/{commit}/{name}"})
            return
        self._file(file, {"X-Repo-Commit": commit, "ETag": f'"{digest(file)[:40]}"'})

    def _file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        size, span = file.stat().st_size, self.headers.get("Range")
        if span and not self.server.no_ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or size - 1), size - 1) + 1
            more = self.fault.more if self.fault else 0
            with file.open("rb") as stream:
                stream.seek(begin)
                data = stream.read(end - begin) + b"\0" * more
            data = data[: end - begin + more]
            self._send(206, data, {**(headers or {}), "Content-Range": f"bytes {begin}-{end - 1}/{size}"})
            return
        self._send(200, _blocks(file), headers or {"ETag": f'"{digest(file)}"'}, length=size)

    def _send(
        self, status: int, data: bytes | Iterable[bytes], headers: dict[str, str] | None = None, length: int = 0
    ) -> None:
        """One answer, spoiled as `self.fault` says."""
        fault = self.fault or Fault()
        if fault.body is not None:
            data = fault.body
        self.send_response(fault.status or status)
        for name, value in {**(headers or {}), **fault.headers}.items():
            self.send_header(name, value)
        if fault.drip_head is not None:
            self.flush_headers()
            self._drip(b"X-Slow: " + b"x" * 60_000, fault.drip_head)
        if fault.pieces is None:
            self.send_header("Content-Length", str(len(data) if isinstance(data, bytes) else length))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.pieces is not None:
            while not self.server.stopping.is_set():
                self.wfile.write(fault.pieces)
        elif fault.cut is not None or fault.drip is not None:
            whole = data if isinstance(data, bytes) else b"".join(data)
            self._drip(whole[: fault.cut], fault.drip)
            self.close_connection = True
        else:
            for block in [data] if isinstance(data, bytes) else data:
                self.wfile.write(block)

    def _drip(self, data: bytes, seconds: float | None) -> None:
        if seconds is None:
            self.wfile.write(data)
            return
        self.wfile.flush()
        for byte in data:
            if self.server.stopping.wait(seconds):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield block
