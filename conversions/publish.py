"""Every family's parity, published: `python -m conversions.publish reports`, part of `make reports`.

A family's traces: the weights that they were recorded on are drawn again, converted as a user would, and compared with
what the original code answered. A family's cases: the original code itself, from the checkouts in PORTER_REFERENCES;
without it the published reports of these stay as they are.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from conversions.record_reference import write_weights
from parity.case import ComponentCase, FamilyCases
from parity.casefile import compare_case_file
from parity.document import write
from parity.named import Pinned, case_file, cases_of
from parity.outcome import Options, Outcome
from parity.run import run_parity
from parity.trace import Trace
from porter.core.convert import convert
from porter.core.family import families, resolve
from porter.core.port import Port

REFERENCES = "PORTER_REFERENCES"


def drawn_cases() -> list[tuple[str, ComponentCase]]:
    """Every component with a trace that was recorded on drawn weights, with its family."""
    found = []
    for name, family in families().items():
        declared: FamilyCases | None = resolve(family.cases) if family.cases else None
        for case in declared.components if declared else ():
            if "weights" in Trace.open(case.trace).meta:
                found.append((name, case))
    return found


def original_cases(family: str) -> list[str]:
    """`FAMILY:NAME` of every case of a family against original code."""
    return [f"{family}:{name}" for name in cases_of(family)]


def checkout_of(case: str) -> Path | None:
    """The folder of a case's original code in PORTER_REFERENCES, if it is there."""
    root, repository = os.environ.get(REFERENCES), Pinned.of(case_file(case)).repository
    folder = Path(root or "") / repository.rpartition("/")[2]
    return folder if root and repository and folder.is_dir() else None


def port_of(family: str, case: ComponentCase, folder: Path) -> Path:
    """The port of a trace's weights, converted as a user would, from a file with the component's usual name."""
    part = families()[family].component(case.component)
    usual = Path(part.original_name if part and part.original_name else "source")
    source = folder / usual.with_suffix(".safetensors").name
    config = write_weights(case.trace, source)
    convert(source, folder / "port", component=case.component, config=config or None, verify=True)
    return folder / "port" / case.component


def against_trace(family: str, case: ComponentCase) -> Outcome:
    """One component on drawn weights, compared with its trace; named by the trace, as variants share a component."""
    declared: FamilyCases = resolve(str(families()[family].cases))
    with tempfile.TemporaryDirectory(prefix="porter-publish-") as folder:
        port = Port.open(port_of(family, case, Path(folder)).parent)
        outcome = run_parity(port, family, replace(declared, components=(case,), pipelines={}), Options())
    for result in outcome.components:
        result.component = case.trace.stem
    for kind in ("weights", "recipes", "traces"):
        (only,) = outcome.facts[kind].values()
        outcome.facts[kind] = {case.trace.stem: only}
    return outcome


def merged(family: str, outcomes: Iterable[Outcome]) -> Outcome:
    """Several comparisons of a family as one result."""
    whole = Outcome(None, family, Options())
    for outcome in outcomes:
        whole.components += outcome.components
        whole.unproven += outcome.unproven
        for kind, values in outcome.facts.items():
            if kind in ("weights", "recipes", "traces", "code"):
                whole.facts[kind] = {**whole.facts.get(kind, {}), **values}
            elif kind != "manifest_sha256":  # each component was a port of its own
                whole.facts[kind] = values
        gc.collect()
    return whole


def main() -> None:
    """Write `FAMILY-components` and `FAMILY-originals` below a folder."""
    parser = argparse.ArgumentParser(prog="python -m conversions.publish")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="one family")
    options = parser.parse_args()

    def publish(family: str, kind: str, outcomes: Iterable[Outcome]) -> None:
        command = f"python -m conversions.publish reports --only {family}"
        _, page = write(merged(family, outcomes), command, options.folder / f"{family}-{kind}")
        print(page)

    wanted = [name for name in families() if options.only in (None, name)]
    drawn = drawn_cases()
    for family in wanted:
        if cases := [case for name, case in drawn if name == family]:
            publish(family, "components", (against_trace(family, case) for case in cases))
    for family in wanted:
        cases = {case: checkout_of(case) for case in original_cases(family)}
        if absent := [case for case, checkout in cases.items() if checkout is None]:
            print(f"{family}: {REFERENCES} has no {Pinned.of(case_file(absent[0]))}; its report stays as it is")
        elif cases:
            asked = {case: Options(reference_repo=checkout, shims=()) for case, checkout in cases.items()}
            publish(family, "originals", (compare_case_file(case, None, asked[case]) for case in cases))


if __name__ == "__main__":
    main()
