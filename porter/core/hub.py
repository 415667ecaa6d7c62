"""A hub repository as a source: its file list, JSON files through the hub's own cache, headers by HTTP range.

Weights are downloaded only when a conversion asks for a path, and then into the hub's cache as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.core.card import declared
from porter.core.errors import BadInputError, MissingError, PorterError, UsageError
from porter.core.files import MAX_FILES, MAX_JSON, FileInfo, list_files
from porter.core.hubcalls import ask, timeout
from porter.core.hubstore import COMMIT, HubStore, go_online
from porter.core.ranges import RangeReader
from porter.core.source import LocalSource, Source
from porter.core.trouble import Trouble

if TYPE_CHECKING:
    from porter.core.checkpoint import TensorInfo

# What all first reads of a repository may take together, shared by its weight files. A header takes about 110 bytes a
# tensor: 20 to 40 KB a shard, 87 KB for a transformer of 12 billion parameters in one file.
FIRST_READS = 1 << 20
LEAST_FIRST, MOST_FIRST = 1 << 14, 1 << 17
AT_ONCE = 8  # requests on their way
_WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|/\.|[/.]$")  # what git allows in no branch or tag


def open_hub(repo: str, *, revision: str | None, token: str | None, offline: bool | None) -> Source:
    """Opens hub repository `repo` at `revision` (its default branch when None); the commit is resolved and kept.

    Raises:
        UsageError: a revision that is no name of a branch, tag or commit; a token with characters that none has.
        AccessError: gated, private, or a token that is not accepted.
        MissingError: no such repository or revision; the hub cannot be reached; offline and not in the cache.
        BadInputError: the hub's file list is hostile or damaged.
    """
    try:
        from huggingface_hub import HfApi, constants
    except ValueError as error:  # it takes its settings apart when it is imported
        raise Trouble(repo).unreachable(f"HF_ENDPOINT is no address: {error}") from error
    if revision is not None and (not 0 < len(revision) <= 200 or _NO_REF.search(revision)):
        raise UsageError(
            f"--revision {revision[:80]!r} is no branch, tag or commit", expected="such as main, refs/pr/1 or c0ffee1",
            hint=f"porter plan {repo}",
        )  # fmt: skip
    _check_token(token)
    store = HubStore(repo)
    if offline or (offline is None and constants.HF_HUB_OFFLINE):
        return open_cached(repo, revision, store)
    trouble = Trouble(repo, revision, lambda: _has(store, revision))
    api = HfApi(endpoint=constants.ENDPOINT, token=token)

    def call() -> Any:
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout())

    info = ask(trouble, call, what="the file list")
    source = HubSource(repo, info, api, store, trouble)
    store.remember(revision, source.commit)
    store.keep_listing(source.commit, source.files, source.declared)
    return source


class HubSource(Source):
    """A repository on the hub at one commit."""

    def __init__(self, repo: str, info: Any, api: Any, store: HubStore, trouble: Trouble) -> None:
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise trouble.unfit("the file list", "`sha`, a commit of 40 hexadecimal digits", repr(info.sha)[:80])
        self.kind, self.spec, self.given = "hub", repo, repo
        self.commit = self.revision = info.sha
        self._api, self._store, self._trouble = api, store, replace(trouble, listed=True)
        self.files = listed(info.siblings, trouble)
        card = info.card_data.to_dict() if hasattr(info.card_data, "to_dict") else {}
        self.declared = declared(card if isinstance(card, Mapping) else {})
        if info.gated:
            self.declared["gated"] = str(info.gated)[:40]
        weights = sum(name.endswith(_WEIGHTS) for name in self.files)
        self._seen: dict[str, tuple[dict[str, TensorInfo], dict[str, Any]]] = {}
        self._first = min(max(FIRST_READS // max(weights, 1), LEAST_FIRST), MOST_FIRST)

    def path(self, name: str) -> Path:
        self._known(name)
        return self._download(name, small=False)

    def _download(self, name: str, *, small: bool) -> Path:
        def call() -> Any:
            return self._api.hf_hub_download(self.spec, name, revision=self.commit)

        found = Path(ask(self._trouble, call, what=f"the answer for {name}", small=small))
        # The cache files it under the commit that the answer names, which is not for the server to choose.
        if found != self._store.snapshot(self.commit) / name:
            raise self._trouble.broken(f"{name} of another commit than {self.commit}: {found}")
        return found

    def _json_path(self, name: str) -> Path:
        size = self._known(name).size
        if size > MAX_JSON:
            raise BadInputError(
                f"{name} of {self.spec} is too large for a configuration", expected=f"at most {MAX_JSON} bytes",
                found=f"{size} bytes, which were not downloaded", hint="is it the right repository?",
            )  # fmt: skip
        return self._download(name, small=True)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        from porter.core.headers import read_ranged

        size = self._known(name).size
        if known := self._seen.get(name) or self._store.header(self.commit, name, size):
            return known
        url = hf_hub_url(self.spec, name, revision=self.commit, endpoint=self._api.endpoint)
        words = build_hf_headers(token=self._api.token).get("authorization", "").split()
        token = words[-1] if words else None
        read = RangeReader(url, size, token=token, trouble=self._trouble, timeout=timeout())
        header, notes = read_ranged(read, Path(name), size, self._first)
        self._store.keep_header(self.commit, name, size, header, notes)
        self._seen[name] = header, notes
        return header, notes

    def prefetch(self, names: Iterable[str]) -> None:
        def fetch(name: str) -> None:
            if name.endswith(".json"):
                self._json_path(name)
            else:
                self.header(name)

        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            list(pool.map(fetch, names))  # raises the error of the first name that has one


def listed(siblings: Any, trouble: Trouble) -> dict[str, FileInfo]:
    """The files of a hub's listing, sorted by path; hidden names are left out.

    Raises:
        BadInputError: a name that leaves the repository or stands there twice, a size that is none, no list at all.
    """
    what = "the file list"
    if not isinstance(siblings, list) or not siblings:
        raise trouble.unfit(what, "`siblings`, a list of files", "none")
    if len(siblings) > MAX_FILES:
        raise trouble.unfit(what, f"at most {MAX_FILES} files", f"{len(siblings)}")
    found: dict[str, FileInfo] = {}
    for entry in siblings:
        name, size = entry.rfilename, entry.size
        digest = entry.lfs.sha256 if entry.lfs else None
        if not isinstance(name, str) or not _inside(name):
            raise trouble.unfit(what, "names of files inside the repository", repr(name)[:120])
        if name in found:
            raise trouble.unfit(what, "each name once", f"{name} twice")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
            raise trouble.unfit(what, f"the size of {name} in bytes", repr(size)[:40])
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
            raise trouble.unfit(what, f"the sha256 of {name}", repr(digest)[:80])
        found[name] = FileInfo(size, digest)
    return {name: found[name] for name in sorted(found) if not any(part[0] == "." for part in name.split("/"))}


def _inside(name: str) -> bool:
    """Whether a listed name is a plain path inside the repository."""
    try:
        long = any(len(part.encode()) > 255 for part in name.split("/")) or len(name) > 1024
    except UnicodeEncodeError:
        return False
    plain = all(part not in ("", ".", "..") for part in name.split("/")) and not re.match(r"[A-Za-z]:", name)
    return plain and not long and "\\" not in name and not _CONTROL.search(name)


def open_cached(repo: str, revision: str | None, store: HubStore) -> Source:
    """The repository as far as this machine holds it.

    Raises:
        MissingError: nothing of that revision is here.
        BadInputError: the cache is damaged.
    """
    commit = store.commit(revision)
    snapshot = store.snapshot(commit) if commit else None
    notes = store.listing(commit) if commit else None
    if commit is None or snapshot is None or not (notes or snapshot.is_dir()):
        others = ", ".join(known[:12] for known in store.commits()[:4])
        raise MissingError(
            f"{repo} is not in the hub's cache at revision {revision or 'main'}",
            expected=f"a snapshot in {store.hub}",
            found=f"offline, and {f'only the commits {others}' if others else 'nothing of it'}",
            hint=f"hf download {repo}, or {go_online()}",
        )
    here = list_files(snapshot) if snapshot.is_dir() else {}
    if notes is None:
        return LocalSource("hub", snapshot, here, spec=repo, given=repo, revision=commit)
    return CachedSource(repo, snapshot, notes, here, commit, store)


class CachedSource(LocalSource):
    """A repository that was planned before: its whole file list, the files and the headers that are here."""

    def __init__(
        self,
        repo: str,
        snapshot: Path,
        notes: tuple[dict[str, FileInfo], dict[str, Any]],
        here: Mapping[str, FileInfo],
        commit: str,
        store: HubStore,
    ) -> None:
        super().__init__("hub", snapshot, notes[0], spec=repo, given=repo, revision=commit)
        self.declared, self._here, self._commit, self._store = notes[1], here, commit, store

    def path(self, name: str) -> Path:
        self._known(name)
        if name not in self._here:
            raise MissingError(
                f"{name} of {self.spec} is not on this machine", expected="the file in the hub's cache",
                found="offline, and only what planning needed is here",
                hint=f"hf download {self.spec} {name} --revision {self._commit}, or {go_online()}",
            )  # fmt: skip
        return self.root / name

    def _json_path(self, name: str) -> Path:
        return self.path(name)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        if name not in self._here and (known := self._store.header(self._commit, name, self._known(name).size)):
            return known
        return super().header(name)


def _has(store: HubStore, revision: str | None) -> bool:
    """Whether more than a file list of that revision is here: a plan that broke off leaves no more."""
    try:
        commit = store.commit(revision)
        files, _ = (commit and store.listing(commit)) or ({}, {})
        if commit is None or not files:
            return commit is not None
        weights = [name for name in files if name.endswith(_WEIGHTS)]
        here = store.snapshot(commit)
        return any((here / name).is_file() or store.header(commit, name, files[name].size) for name in weights)
    except PorterError:
        return False


def _check_token(token: str | None) -> None:
    """Refuses a token that no header of HTTP can carry, without printing it.

    Raises:
        UsageError: such a token.
    """
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError(
            "--token holds a character that no token has (it is not shown here)", expected="printable ASCII, no spaces",
            hint="copy the token again, or use `hf auth login`",
        )  # fmt: skip
