"""Who runs a pipeline: what the catalogue promises is what is registered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from porter.core.errors import BadInputError
from porter.core.family import Family, families, resolve
from runtime import registry
from runtime.registry import entry_class, import_pipelines, runs_natively

WITHOUT_CASE = {"WanImageToVideoPipeline"}  # compared with diffusers by its own tests alone
NATIVE = [family for family in families().values() if family.pipeline]


@pytest.mark.parametrize("family", NATIVE, ids=lambda family: family.name)
def test_the_native_pipelines_of_a_record_are_the_registered_ones(family: Family) -> None:
    import_pipelines(family)
    package = f"conversions.{family.name}."
    registered = {name for name, cls in registry._pipelines.items() if cls.__module__.startswith(package)}
    assert registered == set(family.native_pipelines)
    for name in family.native_pipelines:
        assert entry_class(name).pipeline_name == name and registry._configs[name]


@pytest.mark.parametrize("family", NATIVE, ids=lambda family: family.name)
def test_every_native_pipeline_has_a_parity_case(family: Family) -> None:
    assert set(resolve(str(family.cases)).pipelines) == set(family.native_pipelines) - WITHOUT_CASE


def test_who_runs_a_pipeline_is_known_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_pipelines", {})
    monkeypatch.setattr(registry, "resolve", None)
    assert all(runs_natively(name) for family in NATIVE for name in family.native_pipelines)
    assert not runs_natively("AuraFlowPipeline")


def test_a_pipeline_without_native_code_names_those_that_have_it() -> None:
    with pytest.raises(BadInputError, match="no family runs AuraFlowPipeline") as error:
        entry_class("AuraFlowPipeline")
    names = str(error.value.expected).split(", ")
    assert set(names) >= {name for family in families().values() for name in family.native_pipelines}
    assert names == sorted(names)


@pytest.mark.parametrize("fault", ["too few", "too many", "no module"])
def test_a_record_that_promises_something_else_is_refused(fault: str) -> None:
    family = max(NATIVE, key=lambda known: len(known.native_pipelines))
    changes: dict[str, dict[str, Any]] = {
        "too few": {"native_pipelines": family.native_pipelines[1:]},
        "too many": {"native_pipelines": (*family.native_pipelines, "AuraFlowPipeline")},
        "no module": {"pipeline": None},
    }
    with pytest.raises(BadInputError, match="disagree") as error:
        import_pipelines(replace(family, **changes[fault]))
    assert family.native_pipelines[-1] in str(error.value.expected) and family.name in str(error.value.hint)


def test_entry_classes_that_are_not_registered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import_pipelines(NATIVE[0])
    monkeypatch.setattr(registry, "_pipelines", {})
    with pytest.raises(BadInputError, match="disagree"):
        import_pipelines(NATIVE[0])
