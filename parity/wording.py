"""How numbers and verdicts of a result document are written, on the screen, in HTML and in Markdown alike."""

from __future__ import annotations

import math
from typing import Any, Literal

SKIPPED = "not compared"
State = Literal["pass", "holds", "fail"]


def sci(value: float | None) -> str:
    """A difference with two digits: `2.4e-06`, `0`, and `–` for none."""
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def short(value: float | None) -> str:
    """The same where space is scarce: `2.4e-6`."""
    mantissa, _, exponent = sci(value).partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def ratio_text(value: float | None) -> str:
    """A difference in floors: `0.28`, `414000`."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def likeness(metrics: dict[str, Any]) -> str:
    """How alike two pictures are: `PSNR 41.2 dB, SSIM 0.9988`."""
    if metrics["max_abs"] == 0:
        return "equal pictures"
    psnr = "–" if metrics["psnr"] is None else f"{metrics['psnr']:.1f} dB"
    return f"PSNR {psnr}, SSIM {'–' if metrics['ssim'] is None else format(metrics['ssim'], '.4f')}"


def results(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every comparison of a document, the pipeline's last."""
    return [*data["components"], *([data["pipeline"]] if data["pipeline"] else [])]


def decisive(data: dict[str, Any]) -> dict[str, Any] | None:
    """The failing comparison that the conclusion names: the first with a guilty module, else the first."""
    failing = [result for result in results(data) if not result["passed"]]
    return next((result for result in failing if result.get("guilty")), next(iter(failing), None))


def further(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The modules and steps that fail by themselves beside the guilty one, which is most often the first of them."""
    faults, guilty = result.get("faults", []), result.get("guilty")
    if not faults or not guilty:
        return list(faults)
    first = faults[0]
    pair = f"{guilty['candidate']} ↔ {guilty['reference']}"
    named = first["by"].startswith(pair) or first["reference"] == guilty["reference"]
    return list(faults[1:] if named or (first["step"] and guilty["code"]) else faults)


def uncompared(result: dict[str, Any]) -> list[str]:
    """Every output that was not compared, with the reason."""
    found = (v for v in result.get("outputs", ()) if v["status"] == SKIPPED)
    return [": ".join(filter(None, (v["name"], v["status"], v["note"]))) for v in found]


def state(data: dict[str, Any]) -> State:
    """Whether a document is a pass, holds as far as it goes, or fails."""
    return "pass" if data["passed"] else "holds" if data["holds"] else "fail"


def judged(data: dict[str, Any]) -> str:
    """How the numbers came about: `float32, judged in float64, cpu`."""
    how = "judged in float64" if data["dtype"] == "float32" else "judged by the distance from the float64 truth"
    return f"{data['dtype']}, {how}, {data['device']}"


def sentence(data: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    found = results(data)
    if not data["holds"]:
        failed = decisive(data)
        if failed:  # why, and which module, stands below it
            best = failed["headline"] if failed["status"] != SKIPPED else None
            number = f", by {sci(best['max_abs'])} with a noise floor of {sci(best['floor'])}" if best else ""
            return f"Parity fails: {failed['title']}: {failed['status']}{number}."
        return f"Parity fails: {data['conclusion'].removeprefix('FAIL ').rstrip('.')}."
    values = sum(r["counts"]["compared"] for r in found)
    best = max((r["headline"] for r in found if r["headline"]), key=lambda v: v["max_abs"] or 0.0, default=None)
    number = f"; largest difference {sci(best['max_abs'])}, noise floor {sci(best['floor'])}" if best else ""
    several = "comparison passes" if len(found) == 1 else "comparisons pass"
    line = f"{len(found)} {several}, {values:,} tensors compared, none left out{number}"
    if data["passed"]:
        return f"Parity holds: {line}."
    short_of = ["only a part was asked for"] if data["partial"] else []
    short_of = ["only outputs were compared, no module was looked at"] if data["level"] == "component" else short_of
    if data["unproven"]:
        short_of.append(f"not compared with the original: {', '.join(data['unproven'])}")
    return f"What was compared holds, which is no verdict on the whole ({'; '.join(short_of)}): {line}."
