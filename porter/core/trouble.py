"""What goes wrong with a hub, in one place: each failure's own words, exit code and next command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from porter.core.errors import AccessError, BadInputError, MissingError, PorterError


@dataclass(frozen=True)
class Trouble:
    """The errors of one repository.

    Attributes:
        repo: its id.
        revision: as the user gave it, None for the default branch.
        cached: whether the cache holds something of that revision, asked for only when it matters.
        listed: whether the file list is here already: what fails then is one file, which no cache holds.
    """

    repo: str
    revision: str | None = None
    cached: Callable[[], bool] = lambda: False
    listed: bool = False

    @property
    def _pin(self) -> str:
        return f" --revision {shlex.quote(self.revision)}" if self.revision else ""

    def _instead(self) -> str:
        """The next command where the hub cannot be had."""
        if not self.listed and self.cached():
            return f"porter plan {self.repo}{self._pin} --offline, from what this machine holds of it"
        return "porter plan <a local folder>; HF_ENDPOINT names another hub, HTTPS_PROXY a way there"

    def unreachable(self, detail: str) -> MissingError:
        """No connection at all: refused, no such host, no network."""
        return MissingError(
            f"the hub cannot be reached for {self.repo}",
            expected="a folder or file of this name here, or an answer over HTTP",
            found=detail[:300], hint=self._instead(),
        )  # fmt: skip

    def slow(self, detail: str) -> MissingError:
        return MissingError(
            f"the hub is too slow for {self.repo}", expected="an answer in time", found=detail[:300],
            hint=f"HF_HUB_DOWNLOAD_TIMEOUT=60 porter plan {self.repo}{self._pin} (seconds), or {self._instead()}",
        )  # fmt: skip

    def broken(self, detail: str) -> MissingError:
        """An answer that broke off or breaks the protocol."""
        return MissingError(
            f"an answer of the hub for {self.repo} cannot be used", expected="one whole, honest answer",
            found=detail[:300], hint=f"try again, or {self._instead()}",
        )  # fmt: skip

    def no_range(self, url: str, expected: str, found: str) -> MissingError:
        return MissingError(
            f"the server does not serve byte ranges of {url}", expected=expected, found=found[:300],
            hint=f"hf download {self.repo}{self._pin}, then porter plan <the folder it prints>",
        )  # fmt: skip

    def unfit(self, what: str, expected: str, found: str) -> BadInputError:
        """A document of the hub that is hostile or damaged."""
        return BadInputError(
            f"{what} of {self.repo}", expected=expected, found=found[:300],
            hint="is HF_ENDPOINT a hub, or does a proxy stand before it? If so, look at the repository's page",
        )  # fmt: skip

    def refused(self, status: int | None, headers: Mapping[str, str], detail: str = "") -> PorterError:
        """The error for an HTTP status that is none of success."""
        words = {name.lower(): value for name, value in headers.items()}
        code, said = words.get("x-error-code", "")[:40], words.get("x-error-message", "")[:120]
        found = " ".join(filter(None, (f"HTTP {status}", code, detail, said and f"({said})")))
        page = f"accept the terms on the page of {self.repo}"
        if status == 403 and code != "GatedRepo":
            return AccessError(
                f"{self.repo} may not be read by whom this token belongs to", expected="a token with the right to read",
                found=found, hint=f"`hf auth whoami`, then --token TOKEN or `hf auth login`; or {page}",
            )  # fmt: skip
        if code == "GatedRepo":
            without = "no valid token was sent" if status == 401 else "this token has no access"
            return AccessError(
                f"{self.repo} is gated: {without}", expected="a token of someone who accepted its terms", found=found,
                hint=f"{page}, then `hf auth login` or --token TOKEN",
            )  # fmt: skip
        if status == 401:
            return AccessError(
                f"{self.repo} is private, gated or does not exist, and no valid token was sent", found=found,
                expected="a public repository or a valid token",
                hint=f"check the name, then `hf auth login`, and {page}",
            )  # fmt: skip
        if status == 404 and code == "RevisionNotFound":
            return MissingError(
                f"{self.repo} has no revision {self.revision}", expected="a branch, a tag or a commit", found=found,
                hint=f"porter plan {self.repo}",
            )  # fmt: skip
        if status == 404 and (self.listed or code == "EntryNotFound"):
            return MissingError(
                f"{self.repo} no longer serves a file that it lists", expected="the file at this commit", found=found,
                hint=f"porter plan {self.repo}{self._pin}",
            )  # fmt: skip
        if status == 404:
            return MissingError(
                f"{self.repo} is neither a path here nor a repository on the hub", found=found,
                expected="a folder, a file, or a hub id `owner/name`",
                hint="check the name; a private repository needs `hf auth login`",
            )  # fmt: skip
        if status == 429:
            return MissingError(
                f"the hub limits how often you may ask, and did not answer for {self.repo}", found=found,
                expected="an answer",
                hint=f"{_wait(words)}; a token (`hf auth login`) raises the limit; or {self._instead()}",
            )  # fmt: skip
        if status == 408 or (status or 0) >= 500:
            return MissingError(
                f"the hub failed while it was asked for {self.repo}", expected="an answer", found=found,
                hint=f"try again in a minute, or {self._instead()}",
            )  # fmt: skip
        return MissingError(
            f"the hub refused a request for {self.repo}", expected="an answer", found=found,
            hint=f"update huggingface_hub, or {self._instead()}",
        )  # fmt: skip


_ADDRESS = re.compile(
    r"(?:https?://[^/\s]+|[\w-]+(?:\.[\w-]+)+)/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?:tree|blob|resolve)/([^/?#\s]+)(?:/[^?#]*)?)?/?(?:[?#].*)?"
)


def no_such_path(given: str) -> MissingError:
    """What is said of a name that is no path and no hub id; the address of a repository's page gives its id."""
    address = _ADDRESS.fullmatch(given)
    hint = "porter plan builtin:tiny-flux"
    if address and address[1].split("/")[0] not in ("datasets", "spaces"):
        hint = f"porter plan {address[1]}" + (f" --revision {shlex.quote(address[2])}" if address[2] else "")
    return MissingError(
        f"no such path: {given}", expected="a folder, a checkpoint file, a hub id `owner/name`, or builtin:<name>",
        found="the address of a page" if address else None, hint=hint,
    )  # fmt: skip


def _wait(headers: Mapping[str, str]) -> str:
    """How long the hub asks to wait: `Retry-After`, or the `t=` of its `RateLimit`."""
    given = headers.get("retry-after", "").strip()
    limit = headers.get("ratelimit", "").rpartition("t=")[2].strip()
    if (given.isascii() and given.isdigit()) or (not given and limit.isascii() and limit.isdigit()):
        return f"wait {int((given or limit)[:9])} seconds, then run the same again"
    return f"wait until {given[:40]}, then run the same again" if given else "wait, then run the same again"
