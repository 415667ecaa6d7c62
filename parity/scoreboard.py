"""The scoreboard of published reports: `python -m parity.scoreboard reports`, part of `make reports`.

Reads every `parity.json` below the folder and writes `README.md` beside them: one row a comparison, with its floor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = """# Published reports

Written by `make reports`; do not edit. Float32 on the CPU, judged in float64. A difference stands beside its noise
floor: the larger of what both sides themselves lose to float32. `identical` and `rounding` pass.

| family | component | against | verdict | max\\|Δ\\| | floor | compared | skipped | missing |
|---|---|---|---|---|---|---|---|---|
"""


def rows(document: dict[str, Any]) -> list[str]:
    """One table row for each comparison of one parity document."""
    found = []
    results = [(c["component"], c["candidate"], c["against"], c) for c in document["components"]]
    if document.get("pipeline"):
        results.append(("pipeline", "native", "diffusers", document["pipeline"]))
    for component, candidate, against, result in results:
        best, counts = result["headline"], result["counts"]
        numbers = f"{best['max_abs']:.1e} | {best['floor']:.1e}" if best else "– | –"
        cells = " | ".join(str(counts[key]) for key in ("compared", "skipped", "missing"))
        reference = f"original code ({result['reference']})" if against == "trace" else against
        who = f"{document['family']} | {component} ({candidate})"
        found.append(f"| {who} | {reference} | {result['status']} | {numbers} | {cells} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parity.scoreboard")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    lines, links = [], []
    for path in sorted(folder.glob("*/parity.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        lines += rows(document)
        name = path.parent.name
        links.append(f"- [{name}]({name}/report.html): {document['conclusion']}")
    (folder / "README.md").write_text(HEAD + "\n".join(lines) + "\n\n" + "\n".join(links) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'README.md'}: {len(lines)} comparisons")


if __name__ == "__main__":
    main()
