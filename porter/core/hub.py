"""A hub repository as a source: its file list, JSON files through the hub's own cache, headers by HTTP range.

Weights are downloaded only when a conversion asks for a path, and then into the hub's cache as well.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from porter.core.errors import AccessError, BadInputError, MissingError, PorterError
from porter.core.files import FileInfo, list_files
from porter.core.source import LocalSource, Source

if TYPE_CHECKING:
    from porter.core.checkpoint import TensorInfo

T = TypeVar("T")
TIMEOUT = 20.0
FIRST_READ = 1 << 16


def open_hub(repo: str, *, revision: str | None, token: str | None, offline: bool | None) -> Source:
    """Opens hub repository `repo` at `revision` (its default branch when None); the commit is resolved and kept.

    Raises:
        AccessError: gated, private, or a token that is not accepted.
        MissingError: no such repository or revision; the hub cannot be reached; offline and not in the cache.
    """
    from huggingface_hub import HfApi, constants

    if offline or (offline is None and constants.HF_HUB_OFFLINE):
        return _cached(repo, revision, Path(constants.HF_HUB_CACHE))
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    info = _ask(repo, lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT))
    return HubSource(repo, info, api)


class HubSource(Source):
    """A repository on the hub at one commit."""

    def __init__(self, repo: str, info: Any, api: Any) -> None:
        self.kind, self.spec, self.given, self.revision = "hub", repo, repo, info.sha
        self._api = api
        self.files = {
            file.rfilename: FileInfo(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in sorted(info.siblings or [], key=lambda file: file.rfilename)
            if _plain(file.rfilename)
        }
        card = info.card_data.to_dict() if info.card_data else {}
        self.declared = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
        if info.gated:
            self.declared = {**self.declared, "gated": info.gated}

    def path(self, name: str) -> Path:
        self._known(name)
        return Path(_ask(self.spec, lambda: self._api.hf_hub_download(self.spec, name, revision=self.revision)))

    def _json_path(self, name: str) -> Path:
        return self.path(name)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        from huggingface_hub import hf_hub_url

        from porter.core.checkpoint import MAX_HEADER, parse_header

        size = self._known(name).size
        url = hf_hub_url(self.spec, name, revision=self.revision, endpoint=self._api.endpoint)
        read = RangeReader(url, size, token=self._token(), repo=self.spec)
        first = read(0, min(FIRST_READ, size))
        length = 8 + int.from_bytes(first[:8], "little")
        if len(first) < 8 or length > min(size, MAX_HEADER):
            raise BadInputError(
                f"{name} of {self.spec} is no safetensors file",
                found=f"a header of {length - 8} bytes",
                hint="is it uploaded completely?",
            )
        raw = first[:length] if length <= len(first) else first + read(len(first), length)
        return parse_header(raw[8:], Path(name), size)

    def _token(self) -> str | None:
        from huggingface_hub import get_token

        given = self._api.token
        return given if isinstance(given, str) else get_token()


class RangeReader:
    """Reads byte ranges of one remote file; a server that ignores the range is refused, not read to its end.

    Redirects are followed by hand: the token goes to the hub's own host only, never to where it redirects.
    """

    def __init__(self, url: str, size: int, *, token: str | None, repo: str) -> None:
        self.url, self.size, self.token, self.repo = url, size, token, repo

    def __call__(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end).

        Raises:
            AccessError: 401 or 403.
            MissingError: any other failure, or an answer that is not that range.
        """
        url, home = self.url, urllib.parse.urlsplit(self.url)[:2]
        for _ in range(6):
            headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "porter"}
            if self.token and urllib.parse.urlsplit(url)[:2] == home:  # scheme and host
                headers["Authorization"] = f"Bearer {self.token}"
            try:
                with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
                    return self._checked(answer, begin, end)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (301, 302, 303, 307, 308) and error.headers.get("Location"):
                        url = urllib.parse.urljoin(url, error.headers["Location"])
                        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                            raise unreachable(self.repo, f"a redirect to {url}") from error
                        continue
                    raise refusal(self.repo, error.code, f"HTTP {error.code} for {self.url}") from error
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise unreachable(self.repo, str(error)) from error
        raise unreachable(self.repo, f"redirects without end from {self.url}")

    def _checked(self, answer: IO[bytes], begin: int, end: int) -> bytes:
        status, span = getattr(answer, "status", None), getattr(answer, "headers", {}).get("Content-Range")
        if status != 206 or span != f"bytes {begin}-{end - 1}/{self.size}":
            raise MissingError(
                f"the server does not serve byte ranges of {self.url}",
                expected=f"206 with bytes {begin}-{end - 1}/{self.size}",
                found=f"{status} with {span}",
                hint=f"hf download {self.repo}, then porter plan <the folder it prints>",
            )
        data = answer.read(end - begin + 1)
        if len(data) != end - begin:
            raise unreachable(self.repo, f"{len(data)} bytes of {end - begin} arrived")
        return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def refusal(repo: str, status: int | None, detail: str) -> PorterError:
    """The error for an HTTP status: 401 and 403 are a matter of access, everything else is missing."""
    if status == 401:
        return AccessError(
            f"{repo} is private, gated or does not exist, and no valid token was sent",
            found=detail,
            hint=f"check the name, then `hf auth login`, and accept the terms on the page of {repo}",
        )
    if status == 403:
        return AccessError(
            f"{repo} is gated: this token has no access", found=detail, hint=f"accept the terms on the page of {repo}"
        )
    if status == 404:
        return MissingError(
            f"{repo} is neither a path here nor a repository (or revision) on the hub",
            found=detail,
            hint="check the name and --revision; a private repository needs `hf auth login`",
        )
    return unreachable(repo, detail)


def unreachable(repo: str, detail: str) -> MissingError:
    """The hub did not answer, or not sensibly."""
    return MissingError(
        f"the hub cannot be reached for {repo}",
        found=detail,
        hint=f"porter plan {repo} --offline (what the cache holds), or a local folder; HF_ENDPOINT names another hub",
    )


def _ask(repo: str, call: Callable[[], T]) -> T:
    """Runs a call of huggingface_hub and turns its errors into ours."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise refusal(repo, 403, _line(error)) from error
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(repo, _line(error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise refusal(repo, status, _line(error)) from error
    except errors.HFValidationError as error:
        raise MissingError(f"{repo} is not a valid hub id", found=_line(error), hint="owner/name") from error
    except errors.OfflineModeIsEnabled as error:
        raise unreachable(repo, _line(error)) from error
    except Exception as error:
        # The HTTP client below huggingface_hub has changed name between versions; its errors are told by their home.
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests"):
            raise unreachable(repo, _line(error)) from error
        raise


def _cached(repo: str, revision: str | None, cache: Path) -> Source:
    """The repository as far as the hub's cache holds it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    wanted = revision or "main"
    ref = folder / "refs" / wanted
    commit = ref.read_text().strip() if ref.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    if ".." in Path(wanted).parts or Path(wanted).is_absolute() or not snapshot.is_dir():
        raise MissingError(
            f"{repo} is not in the hub's cache at revision {wanted}",
            found=f"offline, and no {snapshot}",
            hint=f"hf download {repo}, or leave out --offline",
        )
    return LocalSource("hub", snapshot, list_files(snapshot), spec=repo, given=repo, revision=commit)


def _plain(name: str) -> bool:
    """Whether a listed name stays inside the repository and is not hidden."""
    parts = name.split("/")
    return "\\" not in name and not any(part == "" or part.startswith(".") for part in parts)


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
