"""What `porter demo` prints; the whole demo runs in tests/test_wheel.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from porter.commands import demo


def test_a_command_is_printed_as_it_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    command = SimpleNamespace(main=lambda **_: None)
    monkeypatch.setattr(demo, "import_module", lambda name: SimpleNamespace(command=command))
    prompt = "a large red circle to the left of a small blue square on a white ground"
    demo._run("generate", "porter-demo/port", prompt, "--seed", "3", "-o", "porter-demo/good.png")
    line = f"$ porter generate porter-demo/port '{prompt}' --seed 3 -o porter-demo/good.png"
    assert capsys.readouterr().out.splitlines() == ["", line]
