"""A result document as JUnit XML, for the test tab of a CI: one suite a comparison, one case a compared tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from parity.wording import SKIPPED, results, sci
from porter.core.atomic import replace_bytes, unwritable

# Everything that XML 1.0 cannot hold, even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(data: dict[str, Any]) -> bytes:
    """The document as XML. What was not compared is an error; nothing is `skipped`, which a CI shows as no harm."""
    root = ET.Element("testsuites", name="porter parity")
    _suite(root, "the whole", data, _whole(data))
    for result in results(data):
        _suite(root, result["title"], data, _cases(result))
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in root)))
    ET.indent(root, " ")
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


Case = tuple[str, str, str, str]  # name, status (empty: passes), message, details


def _whole(data: dict[str, Any]) -> list[Case]:
    """What no single comparison says: whether anything was compared, and with the port's own files."""
    cases = [("something was compared", "" if results(data) else SKIPPED, "nothing was compared", "")]
    changed = ", ".join(data["changed"])
    cases.append(("files unchanged since conversion", "changed" if changed else "", f"changed: {changed}", ""))
    if not data["partial"]:  # else it was not asked for
        cases += [(f"{name} compared with the original", SKIPPED, "no reference of the original was compared", "")
                  for name in data["unproven"]]  # fmt: skip
    return cases


def _cases(result: dict[str, Any]) -> list[Case]:
    """The comparison's own verdict, then every output, module and stage."""
    cases = [("verdict", "" if result["passed"] else result["status"], result["reason"], _told(result.get("guilty")))]
    for v in result.get("outputs", ()):
        cases.append((f"output of {v['name']}", *_failure(v, None)))
    for event in result.get("modules", ()):
        cases.append((event["key"], *_failure(event["free"], event["reset"])))
    for v in (*result.get("stages", ()), *result.get("guards", ())):
        cases.append((v["name"], *_failure(v, None)))
    return cases


def _failure(v: dict[str, Any], reset: dict[str, Any] | None) -> tuple[str, str, str]:
    """(status or nothing, message, details) of one compared tensor."""
    if v["passed"]:
        return "", "", ""
    if v["status"] == SKIPPED:
        return SKIPPED, v["note"] or SKIPPED, ""
    said = f": {v['note']}" if v["note"] else ""
    message = f"{v['status']}, max|Δ| {sci(v['max_abs'])}, floor {sci(v['floor'])}{said}"
    keys = ("max_abs", "max_abs64", "floor", "scaled", "peak", "cosine", "elements", "of")
    details = [f"{key} {v[key]}" for key in keys]
    details += [f"with the reference's input: {reset['status']}, {sci(reset['max_abs64'])} in float64"] if reset else []
    return v["status"], message, "\n".join(details)


def _told(guilty: dict[str, Any] | None) -> str:
    """The guilty module with its reason, line by line."""
    if not guilty:
        return ""
    keys = ("candidate", "reference", "rule", "why", "within", "pass", "call")
    return "\n".join(f"{key}: {guilty[key]}" for key in keys if guilty[key] not in ("", None))


def _suite(root: ET.Element, title: str, data: dict[str, Any], cases: Iterable[Case]) -> None:
    suite = ET.SubElement(root, "testsuite", name=_clean(title), timestamp=_clean(data["created"]))
    properties = ET.SubElement(suite, "properties")
    for key in ("family", "gate", "seed", "dtype", "device", "command", "manifest_sha256"):
        ET.SubElement(properties, "property", name=key, value=_clean(data[key]))
    counts = {"tests": 0, "failures": 0, "errors": 0}
    for name, status, message, details in cases:
        case = ET.SubElement(suite, "testcase", classname=_clean(f"{data['family']}.{title}"), name=_clean(name))
        counts["tests"] += 1
        if status:
            kind = "error" if status == SKIPPED else "failure"
            counts[kind + "s"] += 1
            ET.SubElement(case, kind, type=_clean(status), message=_clean(message)).text = _clean(details)
    for key, number in counts.items():
        suite.set(key, str(number))


def _clean(value: object) -> str:
    return _FORBIDDEN.sub(lambda found: ascii(found[0])[1:-1], "" if value is None else str(value))


def save(data: dict[str, Any], path: Path) -> None:
    """Write the document as a JUnit file, complete or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        replace_bytes(path, to_junit(data))
    except OSError as error:
        raise unwritable(path, error) from error
