"""The scoreboard of published reports: `python -m parity.scoreboard reports`, part of `make reports`.

Reads every `parity.json` one folder below and writes `README.md` and `index.html`: one row a comparison with its floor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.html import environment
from parity.outcome import SCHEMA
from parity.wording import decisive, results, sci, sentence, state
from porter.core.atomic import replace_bytes
from porter.core.errors import BadInputError
from porter.core.markdown import text

HEAD = """# Published reports

Written by `make reports`; do not edit. Float32 on the CPU, judged in float64. A difference stands beside its noise
floor: the larger of what both sides themselves lose to float32. `identical` and `rounding` pass.

| family | component | against | verdict | max\\|Δ\\| | floor | compared | skipped | missing |
|---|---|---|---|--:|--:|--:|--:|--:|
"""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The documents below a folder, by the name of theirs.

    Raises:
        BadInputError: a `parity.json` that is not one.
    """
    found = {}
    for path in sorted(folder.glob("*/parity.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"{path} is no JSON", found=str(error), hint="make reports") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise BadInputError(f"{path} is no result of porter parity", expected=SCHEMA, hint="make reports")
        found[path.parent.name] = document
    return found


def markdown(documents: Mapping[str, dict[str, Any]]) -> str:
    """README.md: a table of all comparisons, and a link to each report."""
    lines = []
    for data in documents.values():
        for result in results(data):
            best, counts = result["headline"], result["counts"]
            numbers = f"{sci(best['max_abs'])} | {sci(best['floor'])}" if best else "– | –"
            cells = " | ".join(str(counts[key]) for key in ("compared", "skipped", "missing"))
            who = f"{text(data['family'])} | {text(result['component'])} ({text(result['candidate'])})"
            lines.append(f"| {who} | {text(against(result))} | {result['status']} | {numbers} | {cells} |")
    links = [f"- [{text(n)}]({n}/report.html): {text(d['conclusion'])}" for n, d in documents.items()]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(links) + "\n"


def page(documents: Mapping[str, dict[str, Any]]) -> str:
    """index.html: the same as a page without network or script."""
    reports = [
        {"name": name, "data": data, "state": state(data), "verdict": sentence(data),
         "why": (decisive(data) or {}).get("reason", ""),
         "rows": [{**r, "against": against(r)} for r in results(data)]}
        for name, data in documents.items()
    ]  # fmt: skip
    passing = sum(r["state"] == "pass" for r in reports)
    found = environment().get_template("scoreboard.html.jinja").render(reports=reports, passing=passing)
    return found.strip() + "\n"


def against(result: Mapping[str, Any]) -> str:
    """What a comparison was made with: `original code (flux.model:Flux at 802fb47)`, `diffusers`."""
    original = result["against"] in ("trace", "reference")
    return f"original code ({result['reference']})" if original else str(result["against"])


def main() -> None:
    """Write both pages into the folder that is named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m parity.scoreboard")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    documents = read(folder)
    replace_bytes(folder / "README.md", markdown(documents).encode())
    replace_bytes(folder / "index.html", page(documents).encode())
    count = sum(len(results(data)) for data in documents.values())
    print(f"wrote {folder / 'README.md'} and {folder / 'index.html'}: {count} comparisons")


if __name__ == "__main__":
    main()
