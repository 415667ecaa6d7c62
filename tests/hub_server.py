"""A hub on this machine: the endpoints that porter uses, served over real HTTP from a folder of files.

Repositories are folders `<root>/<owner>/<name>`. What a test wants to go wrong is set on the server object:
`private` (401), `gated` (403 with the hub's error code on downloads), `broken` (500), `no_ranges` (200 with all bytes).
Large files are redirected to another host name, as the hub does with its storage.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_right"


class HubServer(ThreadingHTTPServer):
    """The server; `requests` keeps (method, path, headers with lower-case names) of everything that was asked."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.broken = False
        self.no_ranges = False
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """The same server under another name: what the redirects point to."""
        return f"http://localhost:{self.server_port}"


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.broken:
            self._send(500, b"broken", body=body)
            return
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] == "models":
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else None, body=body)
            return
        if parts[0] == "storage":
            self._file(hub.root.joinpath(*parts[1:]), body=body)
            return
        if len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
            return
        self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        return

    def _allowed(self, repo: str, *, body: bool, download: bool) -> bool:
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo in self.server.private and not authorised:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body=body)
            return False
        if repo in self.server.gated and download and not authorised:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body=body)
            return False
        return True

    def _info(self, repo: str, revision: str | None, *, body: bool) -> None:
        folder = self.server.root / repo
        if not self._allowed(repo, body=body, download=False):
            return
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
            return
        if revision not in (None, "main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
            return
        siblings = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry: dict[str, object] = {"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
            if file.suffix == ".safetensors":
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": file.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        document = {
            "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [],
            "private": repo in self.server.private, "gated": "manual" if repo in self.server.gated else False,
            "cardData": {"license": "apache-2.0"},
        }  # fmt: skip
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body=body)

    def _resolve(self, repo: str, revision: str, name: str, *, body: bool) -> None:
        file = self.server.root / repo / name
        if not self._allowed(repo, body=body, download=True):
            return
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if file.suffix == ".safetensors":
            size = str(file.stat().st_size)
            headers = {"X-Linked-Size": size, "X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": COMMIT}
            target = f"{self.server.storage}/storage/{repo}/{name}"
            self._send(302, b"", {**headers, "Location": target}, body=body)
            return
        self._file(file, body=body, extra={"X-Repo-Commit": COMMIT, "ETag": f'"{digest[:40]}"'})
        return

    def _file(self, file: Path, *, body: bool, extra: dict[str, str] | None = None) -> None:
        data, span = file.read_bytes(), self.headers.get("Range")
        if span and not self.server.no_ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1) + 1
            headers = {**(extra or {}), "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            self._send(206, data[begin:end], headers, body=body)
            return
        self._send(200, data, extra or {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, body=body)
        return

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
