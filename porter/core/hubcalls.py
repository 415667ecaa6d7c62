"""Calls of huggingface_hub, bounded: it waits as long as a server asks, and reads as much as a server sends.

It retries 429 and 5xx with growing pauses (or for as long as `Retry-After` says), its timeouts begin anew with every
byte, and it reads whole answers into memory. For the small documents that planning needs, a hook in its HTTP client
ends such answers at once, and a deadline ends the rest. Downloads of weights keep huggingface_hub's own ways.
"""

from __future__ import annotations

import errno
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from porter.core.errors import MissingError, PorterError, ResourceError
from porter.core.files import MAX_JSON, MAX_MARKS, count_marks
from porter.core.ranges import within
from porter.core.trouble import Trouble

T = TypeVar("T")
_HTTP_MODULES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "UnsupportedProtocol", "InvalidURL")
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
# The cache names its files after these headers of the answer to HEAD, and looks at none of them.
_NAMES = {"x-repo-commit": r"[0-9a-f]{40}", "etag": r'(W/)?"?[\w+=:-]+"?', "x-linked-etag": r'(W/)?"?[\w+=:-]+"?'}


@dataclass(frozen=True)
class _Guard:
    """What this thread asks for: small documents are bounded, weights are not."""

    trouble: Trouble
    small: bool


_GUARD: ContextVar[_Guard | None] = ContextVar("_GUARD", default=None)  # None: another user of the same client


def timeout() -> float:
    """Seconds that a socket may be silent: HF_HUB_DOWNLOAD_TIMEOUT, 10 by default. An answer may take twice that."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def ask(trouble: Trouble, call: Callable[[], T], *, what: str, small: bool = True) -> T:
    """Runs a call of huggingface_hub and turns its errors into ours.

    Args:
        what: it asks for, in words.
        small: whether it fetches a document of at most 16 MB; False for weights, which take their time.

    Raises:
        AccessError, MissingError: see `Trouble`.
        BadInputError: an answer that is too large, or none that a hub gives.
        ResourceError: its cache cannot be written.
    """
    from huggingface_hub import errors

    try:
        guard = _Guard(trouble, small)
        return within(2 * timeout(), lambda: _guarded(guard, call)) if small else _guarded(guard, call)
    except PorterError:
        raise
    except errors.HFValidationError as error:
        raise MissingError(f"{trouble.repo} is not a valid hub id", found=_line(error), hint="owner/name") from error
    except errors.LocalEntryNotFoundError as error:
        raise _translate(trouble, error.__cause__ or error) from error
    except Exception as error:
        ours = _translate(trouble, error)
        if ours is error and isinstance(error, _BROKEN):
            found = f"{type(error).__name__}: {_line(error)[:160]}"
            ours = trouble.unfit(what, "the answer of a hub", found)
        raise ours from error


def _translate(trouble: Trouble, error: BaseException) -> BaseException:
    """Our error for one of huggingface_hub or of the HTTP client below it; any other one as it is."""
    from huggingface_hub import errors

    kind = type(error)
    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        if response is None:
            return trouble.broken(_line(error))
        return trouble.refused(response.status_code, response.headers, f"for {response.url}")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return trouble.unreachable(_line(error))
    if isinstance(error, TimeoutError) or kind.__name__ in ("ReadTimeout", "WriteTimeout", "PoolTimeout"):
        return trouble.slow(_line(error))
    # The HTTP client below huggingface_hub has changed its name between versions; its errors are told by their home.
    if kind.__module__.split(".")[0] in _HTTP_MODULES:
        return trouble.unreachable(_line(error)) if kind.__name__ in _UNREACHABLE else trouble.broken(_line(error))
    if isinstance(error, OSError):
        if error.errno is None:  # huggingface_hub's own: a file that arrived with another size
            return trouble.broken(_line(error))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return ResourceError(
            "the disk is full: the hub's cache was not written" if full else "the hub's cache cannot be written",
            found=_line(error), hint="free space, or HF_HOME=<a folder with room>, then run the same again",
        )  # fmt: skip
    return error


def _guarded(guard: _Guard, call: Callable[[], T]) -> T:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    client: Any = get_session()
    if (hooks := getattr(client, "event_hooks", None)) and _check not in hooks["response"]:
        client.event_hooks = {
            "request": [*hooks["request"], _plain], "response": [*hooks["response"], _check],
        }  # fmt: skip
    token = _GUARD.set(guard)
    try:
        return call()
    finally:
        _GUARD.reset(token)


def _plain(request: Any) -> None:
    """Before a request: no compression, so that what arrives is what it takes."""
    if (guard := _GUARD.get()) and guard.small:
        request.headers["Accept-Encoding"] = "identity"


def _check(response: Any) -> None:
    """After the head of an answer: refuses it, or bounds its body. Exceptions from here are not retried."""
    guard = _GUARD.get()
    if guard is None:
        return
    trouble = guard.trouble
    for name, pattern in _NAMES.items() if response.request.method == "HEAD" else ():
        if not re.fullmatch(pattern, value := response.headers.get(name, "0" * 40)):
            raise trouble.unfit("an answer", f"an honest {name}", repr(value))
    if not guard.small:
        return
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise trouble.refused(response.status_code, response.headers, f"for {response.url}")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise trouble.broken(f"an answer in the encoding {encoding}, which nobody asked for")
    if encoding != "identity":
        for name in ("Content-Encoding", "Content-Length"):
            if name in response.headers:
                del response.headers[name]
    base = sys.modules[type(response).__module__.split(".")[0]].SyncByteStream
    response.stream = _bounded(response.stream, base, trouble, compressed=encoding != "identity")


def _bounded(stream: Any, base: type, trouble: Trouble, *, compressed: bool) -> Any:
    """`stream`, unpacked, of at most 16 MB and 600,000 JSON values."""
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if compressed else None  # gzip or zlib, by its first bytes

    def chunks(_: Any) -> Iterator[bytes]:
        size = marks = 0
        for raw in stream:
            try:
                chunk = unpack.decompress(raw, MAX_JSON + 1) if unpack else raw
            except zlib.error as error:
                raise trouble.broken(f"a compressed answer that is damaged: {error}") from None
            size, marks = size + len(chunk), marks + count_marks(chunk)
            if size > MAX_JSON or marks > MAX_MARKS:
                raise trouble.unfit(
                    "an endless document", f"at most {MAX_JSON} bytes and {MAX_MARKS} values", f"{size} bytes and more"
                )
            yield chunk

    def close(_: Any) -> None:
        stream.close()

    return type("Bounded", (base,), {"__iter__": chunks, "close": close})()


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
