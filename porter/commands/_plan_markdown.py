"""A plan as Markdown, made to paste into a pull request; whatever a model's files say is shown as text."""

from __future__ import annotations

from porter.commands._render import human_bytes, human_count
from porter.core.markdown import block, code, text
from porter.core.plan import STATUS_MEANING, PortPlan
from porter.core.terms import stated
from porter.core.units import several


def to_markdown(plan: PortPlan) -> str:
    """The plan as one Markdown document."""
    where = f" at {code(plan.revision)}" if plan.revision else ""
    inner = f", folder {code(plan.subfolder)}" if plan.subfolder else ""
    licence = stated(plan.licence) or "none stated"
    size = f"{human_count(plan.parameters)} parameters, " if plan.parameters is not None else ""
    files = "" if plan.kind == "file" else f", {several(plan.files, 'file')}"
    lines = [
        f"## Port plan of {code(plan.source)}",
        "",
        f"- **Source**: {plan.kind}{where}{inner}{files}, {size}{human_bytes(plan.bytes)} of weights",
        f"- **Pipeline**: {code(plan.pipeline_class or 'none named')}, family {text(plan.family or 'unknown')}",
        f"- **Style**: {plan.style or 'none'} ({text(plan.style_reason)})",
        f"- **Licence**: {text(', '.join([licence, *plan.licence.get('files', [])]))}"
        + (f", gated ({text(plan.gated)})" if plan.gated else ""),
    ]
    if plan.closest:
        rule = "reuse or extend" if plan.closest.reusable else "a family of its own"
        lines.append(f"- **Closest family**: {text(plan.closest.title)}, {plan.closest.score:.0%} alike: {rule}")
        lines += [f"  - {text(line)}" for line in plan.closest.differences]
    lines += ["", "| component | library | class | parameters | dtypes | size | status | recipe |",
              "|---|---|---|--:|---|--:|---|---|"]  # fmt: skip
    for part in plan.components:
        cells = (
            text(part.name), text(part.library or "–"), code(part.class_name or "?", cell=True),
            human_count(part.parameters) if part.layout not in ("none", "elsewhere") else "–",
            text(" ".join(part.dtypes) or "–"), human_bytes(part.bytes), part.status,
            code(part.recipe, cell=True) if part.recipe else text(part.location or "–"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *(f"- *{status}*: {STATUS_MEANING[status]}" for status in sorted({p.status for p in plan.components})),
    ]
    notes = [f"- {text(part.name)}: {text(part.note)}" for part in plan.components if part.note]
    notes += [f"- {text(part.name)}: {text(part.model)}" for part in plan.components if part.model]
    notes += [f"- {text(part.name)}: its class is defined by {code(part.custom_code)}, which was not run"
              for part in plan.components if part.custom_code]  # fmt: skip
    notes += [
        f"- {text(extra.file)}: {text(extra.name)}, {human_bytes(extra.bytes)}: {extra.note}" for extra in plan.extras
    ]
    notes += [f"- {text(part.name)}: tied, {text(line)}" for part in plan.components for line in part.shared]
    lines += ["", "### Notes", "", *notes] if notes else []
    if plan.memory:
        from porter.commands._memory import memory_markdown

        lines += ["", "### Memory", "", *memory_markdown(plan.memory, text)]
    if plan.risks:
        lines += ["", "### Risks", "", "| pitfall | where | value | what goes wrong |", "|--:|---|---|---|"]
        lines += [
            f"| {risk.pitfall} | {code(f'{risk.component}.{risk.key}', cell=True)} |"
            f" {code(str(risk.value)[:60], cell=True)} | {text(risk.text)} |"
            for risk in plan.risks
        ]
    if plan.warnings:
        lines += ["", "### Warnings", "", *(f"- {text(line)}" for line in plan.warnings)]
    if plan.checklist:
        from porter.commands._checklist import to_markdown as checklist_markdown
        from porter.core.checklist import Checklist

        lines += ["", checklist_markdown(Checklist.from_json(plan.checklist)).strip()]
    lines += [
        "",
        "### Next",
        "",
        "```sh",
        *map(block, plan.next),
        "```",
    ]
    return "\n".join(lines) + "\n"
