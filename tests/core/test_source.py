"""Sources: folders, files, embedded models and hub repositories over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from porter import builtin
from porter.core.errors import AccessError, BadInputError, CheckpointError, MissingError
from porter.core.files import FileInfo, list_files, read_json
from porter.core.source import open_source
from tests.hub_server import COMMIT, TOKEN, HubServer, hub_server

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
TINY = builtin.locate("tiny-flux")


def tree(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_embedded_model_folder_and_file_list_the_same_files(tmp_path: Path) -> None:
    assert TINY is not None
    embedded = open_source("builtin:tiny-flux")
    folder = open_source(TINY)
    assert (embedded.kind, folder.kind) == ("builtin", "folder")
    assert dict(embedded.files) == dict(folder.files)
    assert embedded.files["ae.safetensors"].size == (TINY / "ae.safetensors").stat().st_size
    assert embedded.json("model_index.json")["_class_name"] == "FluxPipeline"
    single = open_source(TINY / "ae.safetensors")
    assert (single.kind, single.name, list(single.files)) == ("file", "ae", ["ae.safetensors"])
    assert single.header("ae.safetensors")[0].keys() == folder.header("ae.safetensors")[0].keys()


def test_a_relative_path_is_kept_so_that_it_opens_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "model", **{"model_index.json": "{}"})
    monkeypatch.chdir(tmp_path)
    spec = open_source("model").spec
    monkeypatch.chdir("/")
    assert open_source(spec).json("model_index.json") == {}


@pytest.mark.parametrize("model", ["/no/such/place", "./nowhere", "nowhere", "no/such/place", "a/model.safetensors"])
def test_no_such_path(model: str) -> None:
    with pytest.raises(MissingError, match="no such path") as caught:
        open_source(model)
    assert caught.value.hint and caught.value.expected and "hub id" in caught.value.expected


def test_unknown_embedded_model_names_the_known_ones() -> None:
    with pytest.raises(MissingError, match="builtin:tiny-flux"):
        open_source("builtin:huge-flux")


def test_lfs_pointers_show_the_real_size_and_refuse_to_be_weights(tmp_path: Path) -> None:
    tree(tmp_path / "m", **{"w.safetensors": POINTER.format("ab" * 32, 123456789)})
    source = open_source(tmp_path / "m")
    assert source.files["w.safetensors"] == FileInfo(123456789, "ab" * 32, lfs_pointer=True)
    for read in (source.header, source.path):
        with pytest.raises(MissingError, match="LFS pointer") as caught:
            read("w.safetensors")
        assert "lfs pull" in (caught.value.hint or "")


@pytest.mark.parametrize("text", [POINTER.format("xyz", 1), POINTER.format("ab" * 32, -5), POINTER[:43]])
def test_broken_lfs_pointers(tmp_path: Path, text: str) -> None:
    tree(tmp_path / "m", **{"w.safetensors": text})
    with pytest.raises(BadInputError, match="broken Git-LFS pointer"):
        open_source(tmp_path / "m")


def test_links_may_stay_in_the_tree_but_not_leave_it(tmp_path: Path) -> None:
    secret = tree(tmp_path / "outside", **{"secret.json": "{}"})
    inside = tree(tmp_path / "inside", **{"a.json": "{}"})
    (inside / "b.json").symlink_to("a.json")
    assert sorted(list_files(inside)) == ["a.json", "b.json"]
    for target in (secret / "secret.json", secret, tmp_path / "nothing"):
        (inside / "link").symlink_to(target)
        with pytest.raises(BadInputError, match="link is a link that"):
            open_source(inside)
        (inside / "link").unlink()


def test_a_hub_snapshot_may_link_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    tree(repository / "blobs", one="{}")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/one")
    assert list(list_files(snapshot)) == ["config.json"]
    tree(tmp_path / "elsewhere", two="{}")
    (snapshot / "other.json").symlink_to("../../../elsewhere/two")
    with pytest.raises(BadInputError, match=r"other\.json"):
        list_files(snapshot)


def test_empty_and_hidden_folders(tmp_path: Path) -> None:
    tree(tmp_path / "m" / ".git", config="x")
    with pytest.raises(BadInputError, match="empty folder"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_bytes(text.encode("latin1"))
    with pytest.raises(BadInputError, match="not valid JSON"):
        read_json(tmp_path / "c.json")


# The hub. Environment variables are read when huggingface_hub is imported, so each case runs in a process of its own.

PROBE = """
import json, sys
from porter.core.source import open_source
from porter.core.errors import PorterError
try:
    source = open_source(sys.argv[1], **json.loads(sys.argv[2]))
    out = {"kind": source.kind, "revision": source.revision, "declared": dict(source.declared),
           "files": {name: [info.size, info.sha256] for name, info in source.files.items()}}
    for name in json.loads(sys.argv[3]):
        if name.endswith(".json"):
            out[name] = source.json(name)
        else:
            header, metadata = source.header(name)
            out[name] = [{k: [t.dtype, list(t.shape), t.begin, t.end] for k, t in header.items()}, metadata]
    print(json.dumps(out))
except PorterError as error:
    print(json.dumps({"error": type(error).__name__, "code": error.exit_code, "text": str(error)}))
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def ask(
    server: HubServer | None, home: Path, model: str, *read: str, env: dict[str, str] | None = None, **options: object
) -> dict:
    """What a fresh process finds at `model`, with `server` as its hub and `home` as its cache."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    place = server.url if server else "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, model, json.dumps(options), json.dumps(read)],
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": place, "PYTHONPATH": str(Path.cwd()), **(env or {})},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    assert TINY is not None
    repository = tmp_path / "hub" / "acme" / "tiny"
    repository.mkdir(parents=True)
    for name in ("model_index.json", "ae.safetensors"):
        shutil.copy(TINY / name, repository / name)
    with hub_server(tmp_path / "hub") as running:
        yield running


def test_hub_repository_headers_by_range_only(server: HubServer, tmp_path: Path) -> None:
    assert TINY is not None
    found = ask(server, tmp_path / "home", "acme/tiny", "model_index.json", "ae.safetensors")
    assert (found["kind"], found["revision"]) == ("hub", COMMIT)
    assert found["declared"] == {"license": "apache-2.0"}
    assert found["model_index.json"] == json.loads((TINY / "model_index.json").read_text())
    local, metadata = open_source(TINY).header("ae.safetensors")
    assert found["ae.safetensors"][0] == {k: [t.dtype, list(t.shape), t.begin, t.end] for k, t in local.items()}
    assert found["ae.safetensors"][1] == metadata
    spans = [headers["range"] for _, path, headers in server.requests if "range" in headers and "ae.safe" in path]
    assert spans and all(int(span.split("-")[1]) < 1 << 16 for span in spans), spans
    cached = [path.name for path in (tmp_path / "home").rglob("*") if path.is_symlink() or path.suffix == ".json"]
    assert "model_index.json" in cached and "ae.safetensors" not in cached


def test_a_header_longer_than_the_first_read(server: HubServer, tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    tensors = {f"a.very.long.name.of.a.tensor.in.block.{i}.weight": numpy.zeros(1, "uint8") for i in range(900)}
    save_file(tensors, server.root / "acme" / "tiny" / "long.safetensors")
    found = ask(server, tmp_path / "home", "acme/tiny", "long.safetensors")
    assert set(found["long.safetensors"][0]) == set(tensors)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(server: HubServer, tmp_path: Path) -> None:
    server.private.add("acme/tiny")
    found = ask(server, tmp_path / "home", "acme/tiny", "ae.safetensors", token=TOKEN)
    assert "error" not in found, found
    by_host: dict[str, set[bool]] = {}
    for headers in (headers for _, path, headers in server.requests if "acme/tiny" in path):
        by_host.setdefault(headers["host"].split(":")[0], set()).add("authorization" in headers)
    assert by_host == {"127.0.0.1": {True}, "localhost": {False}}


def refused(server: HubServer | None, tmp_path: Path, *read: str, model: str = "acme/tiny", **options: object) -> dict:
    found = ask(server, tmp_path / "home", model, *read, **options)
    assert "error" in found, found
    assert "next:" in found["text"]
    return found


def test_private_gated_missing_and_broken(server: HubServer, tmp_path: Path) -> None:
    assert refused(server, tmp_path, model="acme/none")["code"] == MissingError.exit_code
    assert refused(server, tmp_path, revision="v9")["code"] == MissingError.exit_code
    server.gated.add("acme/tiny")
    gated = refused(server, tmp_path, "ae.safetensors")
    assert gated["code"] == AccessError.exit_code and "gated" in gated["text"]
    assert refused(server, tmp_path, "model_index.json")["code"] == AccessError.exit_code
    server.private.add("acme/tiny")
    private = refused(server, tmp_path)
    assert private["code"] == AccessError.exit_code and "auth login" in private["text"]
    assert refused(server, tmp_path, token="hf_wrong")["code"] == AccessError.exit_code
    server.broken = True
    broken = refused(server, tmp_path)
    assert broken["code"] == MissingError.exit_code and "cannot be reached" in broken["text"]


def test_a_server_that_ignores_ranges_is_refused(server: HubServer, tmp_path: Path) -> None:
    server.no_ranges = True
    found = refused(server, tmp_path, "ae.safetensors")
    assert found["code"] == MissingError.exit_code and "206" in found["text"]


def test_unreachable_and_offline(server: HubServer, tmp_path: Path) -> None:
    assert "cannot be reached" in refused(None, tmp_path)["text"]
    offline = refused(None, tmp_path, offline=True)
    assert offline["code"] == MissingError.exit_code and "not in the hub's cache" in offline["text"]
    ask(server, tmp_path / "home", "acme/tiny", "model_index.json", revision=COMMIT)
    for options in ({"offline": True, "revision": COMMIT}, {"env": {"HF_HUB_OFFLINE": "1"}, "revision": COMMIT}):
        found = ask(None, tmp_path / "home", "acme/tiny", "model_index.json", **options)  # type: ignore[arg-type]
        assert (found["kind"], found["revision"]) == ("hub", COMMIT)
        assert list(found["files"]) == ["model_index.json"]


def test_a_corrupt_remote_header(server: HubServer, tmp_path: Path) -> None:
    (server.root / "acme" / "tiny" / "bad.safetensors").write_bytes(
        b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 9
    )
    found = refused(server, tmp_path, "bad.safetensors")
    assert found["code"] == CheckpointError.exit_code and "bad.safetensors" in found["text"]
