"""The front matter of model cards: what is taken, and that nothing in it costs anything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from porter.core.card import read_card
from porter.core.source import open_source

CARD = """---
language:
- en
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
extra_gated_prompt: >-
  By clicking "Agree", you agree to the
  licence: mit
base_model:
- a/base
- "b/other"
library_name: diffusers
pipeline_tag: text-to-image
model-index:
- name: x
  results: [{license: wrong}]
---
# A model
license: not this
"""


def test_a_card() -> None:
    assert read_card(CARD) == {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md",
        "base_model": ["a/base", "b/other"], "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "gated": "by its model card",
    }  # fmt: skip


def test_it_reads_as_yaml_does() -> None:
    """The same values as from the whole document, where that can be parsed at all."""
    whole = yaml.safe_load(CARD.split("---\n")[1])
    found = read_card(CARD)
    assert all(found[key] == whole[key] for key in found if key != "gated")


@pytest.mark.parametrize(("text", "wanted"), [
    ("", {}),
    ("# A model\nlicense: mit", {}),
    ("---\nlicense: mit\n", {}),  # it does not end
    ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    ("---\nlicense: no\n---", {"license": "no"}),
    ("---\nlicense: 1.0\n---", {"license": "1.0"}),
    ("---\nlicense: [mit, apache-2.0]\n---", {"license": "mit, apache-2.0"}),
    ("---\nlicense: 'it''s'  # a comment\n---", {"license": "it's"}),
    ("---\nlicense_link: >-\n  https://a\n  /b\n---", {"license_link": "https://a /b"}),
    ("---\nlicense: mit\nlicense: other\n---", {"license": "other"}),
    ("---\nlicense: {a: b}\nbase_model: a/b\n---", {"base_model": ["a/b"]}),
    ("---\nlicense: [[mit]]\nlibrary_name: x\n---", {"library_name": "x"}),
    ("---\nbroken: [\nlicense: mit\n---", {"license": "mit"}),
    ("---\nlicense: [\npipeline_tag: t\n---", {"pipeline_tag": "t"}),
    ("---\nlicense: &a mit\nlicense_name: *a\n---", {}),
    ("---\nlicense: !!python/object/apply:os.system [touch /tmp/x]\n---", {}),
    ("---\nlicense: " + "x" * 600 + "\n---", {}),
    ("---\nlicense: " + "[" * 4000 + "\n---", {}),
    ("---\nextra_gated_fields:\n  Name: text\n---", {"gated": "by its model card"}),
    ("---\nlicense:mit\n---", {}),
])  # fmt: skip
def test_odd_cards(text: str, wanted: dict[str, object]) -> None:
    assert read_card(text) == wanted


def test_hostile_cards_cost_nothing() -> None:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 30)) + "license: *a29\n"
    merges = "base_model: {<<: [{a: b}, {a: b}]}\n" * 20_000
    for text in (laughs, merges, "license:\n" + "- x\n" * 200_000, "license: " + "{a: " * 3000, "x" * 5_000_000):
        began = time.monotonic()
        assert read_card(f"---\n{text}\n---\n") == {}
        assert time.monotonic() - began < 2, text[:40]


def test_a_folder_declares_what_its_readme_says(tmp_path: Path, tiny_flux: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert open_source(tmp_path).declared == {}
    (tmp_path / "README.md").write_text(CARD)
    declared = open_source(tmp_path).declared
    assert declared["license_name"] == "flux-1-dev-non-commercial-license" and declared["gated"] == "by its model card"
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert open_source(tmp_path).declared == {"license": "�"}
    source = open_source(tmp_path)
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    assert source.declared == {}


def test_yaml_is_not_imported_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    code = "import sys; from porter.core.source import open_source as o; o(sys.argv[1]).declared; "
    code += "print('yaml' in sys.modules)"
    for text, wanted in (
        (None, "False"),
        ("# A model\n", "False"),
        ("---\nlanguage: en\n---\n", "False"),
        (CARD, "True"),
    ):
        if text:
            (tmp_path / "README.md").write_text(text)
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted
