"""Sources: folders, files, embedded models and hub repositories over real HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from porter import builtin
from porter.core.errors import BadInputError, MissingError, UsageError
from porter.core.files import FileInfo, list_files, read_json
from porter.core.source import open_source

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


@pytest.mark.parametrize(
    ("given", "following"),
    [
        ("https://example.org/owner/some-model", "porter plan owner/some-model"),
        ("example.org/owner/some-model/", "porter plan owner/some-model"),
        ("http://example.org/owner/m/tree/refs-1/vae?x=1", "porter plan owner/m --revision refs-1"),
        ("https://example.org/datasets/owner/m", "porter plan builtin:tiny-flux"),
        ("https://example.org/", "porter plan builtin:tiny-flux"),
        ("a/b/c/d", "porter plan builtin:tiny-flux"),
    ],
)
def test_the_address_of_a_repository_s_page_gives_its_id(given: str, following: str) -> None:
    with pytest.raises(MissingError) as caught:
        open_source(given)
    assert caught.value.hint == following


def test_an_empty_name_is_not_this_folder() -> None:
    with pytest.raises(UsageError, match="MODEL is empty"):
        open_source("")
