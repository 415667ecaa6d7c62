"""A result document as Markdown, made to paste into a pull request; nothing in it is markup but ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from parity.wording import decisive, further, judged, likeness, ratio_text, results, sci, sentence, state, uncompared
from porter.core.markdown import block, code, text
from porter.core.units import several

ROWS = 40  # of what fails; a comment on a pull request has room for 65,536 characters
BADGES = {"pass": "PASS", "holds": "holds, no verdict", "fail": "FAIL"}


def to_markdown(data: dict[str, Any]) -> str:
    """The document as one Markdown text."""
    lines = [f"## Parity of {code(data['family'])}: {BADGES[state(data)]}", "", text(sentence(data)), ""]
    lines += _comparisons(data)
    pipeline = data["pipeline"]
    if pipeline and pipeline["metrics"]:
        pixels = several(pipeline["pixels_changed"], "pixel")
        lines += [f"Pictures: {likeness(pipeline['metrics'])}; {pixels} changed in 8 bits.", ""]
    lines += _guilty(data["guilty"]) if data["guilty"] else []
    lines += _list("Changed after conversion", [code(name) for name in data["changed"]])
    lines += _list("Not compared with the original", [code(name) for name in data["unproven"]])
    for result in results(data):
        lines += _faults(result)
        if result["reason"] and not (data["guilty"] and result is decisive(data)):
            lines += [f"**{text(result['title'])}**: {text(result['reason'])}", ""]
        lines += [f"- {text(said)}\n" for said in uncompared(result) if said != result["reason"]]
        lines += _failing(result)
    lines += _folded("Noise floors and outputs", _outputs(data))
    remarks = [
        f"- {kind}, {text(result['title'])}: {text(said)}"
        for kind in ("warning", "note")
        for result in results(data)
        for said in result.get(kind + "s", ())
    ]
    lines += _folded(f"Warnings and notes ({len(remarks)})", remarks) if remarks else []
    lines += _folded("Environment and hashes", _bound(data))
    return "\n".join([*lines, "Repeat it:", "", "```sh", block(data["command"]), "```"]) + "\n"


def _comparisons(data: dict[str, Any]) -> list[str]:
    head = ("comparison", "verdict", "max\\|Δ\\|", "float64", "floor", "floors", "compared", "skipped", "missing")
    rows = []
    for result in results(data):
        best, counts = result["headline"], result["counts"]
        keys = ("max_abs", "max_abs64", "floor")
        numbers = [*(sci(best[key]) for key in keys), ratio_text(best["ratio"])] if best else ["–"] * 4
        mark = "✓" if result["passed"] else "✗"
        left = [f"{counts[key]:,}" for key in ("compared", "skipped", "missing")]
        rows.append([text(result["title"]), f"{mark} {result['status']}", *numbers, *left])
    note = (
        f"{text(judged(data))}, gate {data['gate']:g}, seed {data['seed']}. The floor is what "
        "the noisier side itself loses to float32. Anything skipped or missing is not a pass."
    )
    return [*_table(head, rows, left=2), "", note, ""]


def _guilty(guilty: dict[str, Any]) -> list[str]:
    where = text(guilty["component"])
    if guilty["call"] is not None:
        where += f", pass {text(guilty['pass'])}, call {guilty['call']}"
    where += f", within {code(guilty['within'])}" if guilty["within"] else ""
    rule = code(guilty["rule"]) if guilty["rule"] else "none fills it"
    rule += " (its weights answer alike: its code is at fault, or the rule that aligns them)" if guilty["code"] else ""
    also = ", ".join(map(code, guilty["others"]))
    return [
        "### First guilty module",
        "",
        f"- candidate: {code(guilty['candidate'])}",
        f"- reference: {code(guilty['reference'])}",
        f"- where: {where}",
        f"- rule: {rule}",
        f"- why: {text(guilty['why'])}",
        *([f"- blocks that fail although their inputs are the reference's: {also}"] if also else []),
        "",
    ]


def _faults(result: dict[str, Any]) -> list[str]:
    """Modules and steps that fail although the reference's values surround them, beside the first guilty one."""
    found = further(result)
    if not found:
        return []
    shown = [f"- {code(f['text'])}: {f['verdict']['status']}, {sci(f['verdict']['max_abs64'])} in float64"
             + (f", rule {code(f['rule'])}" if f["rule"] else "") for f in found[:ROWS]]  # fmt: skip
    more = [f"- {len(found) - ROWS} more are in `parity.json`"] if len(found) > ROWS else []
    count = several(len(found), "further fault" if result["guilty"] else "fault")
    return [f"**{text(result['title'])}**: {count}, each with the reference's own input", "", *shown, *more, ""]


def _failing(result: dict[str, Any]) -> list[str]:
    """What does not pass: activations, outputs, stages."""
    found = [(e["key"], e["free"], e["reset"]) for e in result.get("modules", ())]
    found += [
        (v["name"], v, None) for v in (*result.get("outputs", ()), *result.get("stages", ()), *result.get("guards", ()))
    ]
    bad = [(key, v, reset) for key, v, reset in found if not v["passed"]]
    if not bad:
        return []
    head = ("where", "verdict", "max\\|Δ\\|", "float64", "floor", "reset, float64")
    rows = [
        [code(key, cell=True), text(": ".join(filter(None, (v["status"], v["note"])))), sci(v["max_abs"]),
         sci(v["max_abs64"]), sci(v["floor"]), sci(reset["max_abs64"] if reset else None)]
        for key, v, reset in bad[:ROWS]
    ]  # fmt: skip
    more = ["", f"{len(bad) - ROWS} more are in `parity.json`."] if len(bad) > ROWS else []
    title = f"{len(bad)} of {len(found)} tensors do not pass"
    return [f"**{text(result['title'])}**", "", *_folded(title, [*_table(head, rows, left=2), *more])]


def _outputs(data: dict[str, Any]) -> list[str]:
    head = ("comparison", "output", "verdict", "max\\|Δ\\|", "float64", "noise of the reference",
            "noise of the candidate", "cosine")  # fmt: skip
    rows = []
    for result in results(data):
        stages = result.get("stages", ())
        for v in [*result.get("outputs", ()), *stages[-1:]]:
            numbers = [sci(v[k]) for k in ("max_abs", "max_abs64", "noise_reference", "noise_candidate")]
            cosine = "–" if v["cosine"] is None else f"{v['cosine']:.9f}"
            rows.append([text(result["title"]), text(v["name"]), v["status"], *numbers, cosine])
    return _table(head, rows, left=3)


def _bound(data: dict[str, Any]) -> list[str]:
    lines = [f"- {text(name)} {text(value)}" for name, value in data["environment"].items()]
    hashes = [("manifest", data["manifest_sha256"])] if data["manifest_sha256"] else []
    hashes += [(f"case file {data['case']['file']}", data["case"]["sha256"])] if data["case"] else []
    hashes += [(name, sha) for files in data["weights"].values() for name, sha in files.items()]
    hashes += [(f"recipe of {name}: {r['name']}", r["digest"]) for name, r in data["recipes"].items() if r]
    for name, trace in data["traces"].items():
        commit, shims = trace["reference"].get("commit"), ", ".join(trace.get("shims") or ())
        at = (f" at {commit}" if commit else "") + (f", with stand-ins for {shims}" if shims else "")
        hashes.append(
            (f"reference trace of {name}, {trace['reference']['name']}{at}", trace.get("sha256") or "not kept")
        )
    hashes += [(f"code of {name}", sha) for name, sha in data["code"].items()]
    return [f"- porter {text(data['porter'])}, {text(data['created'])}", *lines,
            *(f"- {text(name)}: {code(sha)}" for name, sha in hashes)]  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """A table whose first `left` columns are words, the others numbers."""
    rule = "|" + "|".join("---" if i < left else "--:" for i in range(len(head))) + "|"
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _list(title: str, items: Sequence[str]) -> list[str]:
    return [f"### {title}", "", *(f"- {item}" for item in items), ""] if items else []


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    """A collapsed part; the title holds words of ours and numbers only."""
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>", ""]
