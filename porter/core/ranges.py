"""Byte ranges of remote files: what a header needs and no more, from servers that may be slow, broken or hostile."""

from __future__ import annotations

import contextvars
import http.client
import io
import queue
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from porter.core.errors import CheckpointError
from porter.core.trouble import Trouble

T = TypeVar("T")
BLOCK = 1 << 16
MAX_REDIRECTS = 5
MAX_SPENT = 16 << 20  # of one file; the vocabulary of a large text encoder takes 10 MB in a GGUF file's start

Read = Callable[[int, int], bytes]


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError after `seconds` in total.

    A socket's own timeout begins anew with every byte that arrives, and looking up a host's name has none at all. So
    the call runs in a thread of its own; one that is given up ends with its socket or with the process.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    try:
        done, found = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {seconds:g} seconds") from None
    if not done:
        raise found
    return found  # type: ignore[no-any-return]


class RangeReader:
    """Reads byte ranges of one remote file; a server that ignores the range is refused, not read to its end.

    Redirects are followed by hand: the token goes to the hub's own host only, never to where it redirects.
    """

    def __init__(self, url: str, size: int, *, token: str | None, trouble: Trouble, timeout: float) -> None:
        self.url, self.size, self.token, self.trouble, self.timeout = url, size, token, trouble, timeout
        self.spent = 0

    def __call__(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end).

        Raises:
            AccessError: 401 or 403.
            MissingError: any other failure, or an answer that is not that range.
            CheckpointError: more than 16 MB of the file were asked for.
        """
        self.spent += end - begin
        if self.spent > MAX_SPENT:
            raise CheckpointError(
                f"{self.url}: what describes its tensors is too long to be read from here",
                expected=f"at most {MAX_SPENT} bytes", found=f"{self.spent} bytes asked for",
                hint=f"hf download {self.trouble.repo}, then porter plan <the folder it prints>",
            )  # fmt: skip
        try:
            return within(2 * self.timeout, lambda: self._fetch(begin, end))
        except urllib.error.URLError as error:
            raise self.trouble.unreachable(str(error.reason)) from error
        except TimeoutError as error:
            raise self.trouble.slow(str(error)) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self.trouble.broken(f"{type(error).__name__}: {error}") from error

    def _fetch(self, begin: int, end: int) -> bytes:
        url, home = self.url, urllib.parse.urlsplit(self.url)[:2]  # scheme, and host with port
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "porter"}
            if self.token and urllib.parse.urlsplit(url)[:2] == home:
                headers["Authorization"] = f"Bearer {self.token}"
            try:
                with _opener().open(urllib.request.Request(url, headers=headers), timeout=self.timeout) as answer:
                    return self._checked(answer, begin, end)
            except urllib.error.HTTPError as error:
                with error:
                    target = error.headers.get("Location")
                    if error.code not in (301, 302, 303, 307, 308) or not target:
                        raise self.trouble.refused(error.code, dict(error.headers.items()), f"for {self.url}") from None
                    url = self._redirected(url, target)
        raise self.trouble.broken(f"redirects without end from {self.url}")

    def _redirected(self, url: str, target: str) -> str:
        """Where a redirect leads; only over HTTP, and not from a secure place to an open one."""
        target = urllib.parse.urljoin(url, target)
        scheme = urllib.parse.urlsplit(target).scheme
        if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
            raise self.trouble.broken(f"a redirect to {target[:200]}")
        return target

    def _checked(self, answer: Any, begin: int, end: int) -> bytes:
        span, encoding = answer.headers.get("Content-Range"), answer.headers.get("Content-Encoding", "identity")
        if answer.status != 206 or span != f"bytes {begin}-{end - 1}/{self.size}" or encoding != "identity":
            raise self.trouble.no_range(
                self.url, f"206 with bytes {begin}-{end - 1}/{self.size}", f"{answer.status} with {span}, {encoding}"
            )
        data: bytes = answer.read(end - begin + 1)
        if len(data) != end - begin:
            count = f"{len(data)}" if len(data) < end - begin else f"more than {end - begin}"
            raise self.trouble.broken(f"{count} bytes of {end - begin} arrived of {self.url}")
        return data


class RangeFile(io.RawIOBase):
    """A remote file for readers that seek, such as `zipfile`: fetched in blocks of 64 KB, each once."""

    def __init__(self, read: Read, size: int, start: bytes = b"") -> None:
        self._read, self.size, self._position = read, size, 0
        whole = len(start) // BLOCK * BLOCK
        self._blocks = {at: start[at : at + BLOCK] for at in range(0, whole, BLOCK)}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError("a place before the file's start")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        begin = self._position
        end = self.size if size is None or size < 0 else min(begin + size, self.size)
        if begin >= end:
            return b""
        first = begin // BLOCK * BLOCK
        wanted = range(first, end, BLOCK)
        if lost := [at for at in wanted if at not in self._blocks]:
            fetched = self._read(lost[0], min(lost[-1] + BLOCK, self.size))
            for at in range(lost[0], lost[-1] + 1, BLOCK):
                self._blocks[at] = fetched[at - lost[0] : at - lost[0] + BLOCK]
        self._position = end
        return b"".join(self._blocks[at] for at in wanted)[begin - first : end - first]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    """Proxies as the environment says; certificates of the system, and those that huggingface_hub trusts."""
    global _OPENER
    if _OPENER is None:
        context = ssl.create_default_context()
        try:
            import certifi

            context.load_verify_locations(certifi.where())
        except (ImportError, OSError):  # the system's alone, then
            pass
        _OPENER = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))
    return _OPENER


_OPENER: urllib.request.OpenerDirector | None = None
