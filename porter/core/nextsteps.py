"""What to do after a plan: commands to paste, the most useful first."""

from __future__ import annotations

import re
import shlex

from porter.core.pointers import download_command, fetch_command, pointers
from porter.core.source import Source
from porter.core.survey import Survey


def next_commands(source: Source, found: Survey) -> list[str]:
    """Commands to paste, the most useful first."""
    parts = found.components
    model, port = shlex.quote(source.given), shlex.quote(f"{source.name}-port")
    at = f" --revision {source.revision}" if source.kind == "hub" and source.revision else ""
    inner = f" --subfolder {shlex.quote(source.subfolder)}" if source.subfolder else ""
    include = f" --include {shlex.quote(source.subfolder + '/*')}" if source.subfolder else ""
    pin = at + inner
    again, work = f"porter plan {model}{pin}", f"porter plan {model}{pin} --target porter"
    family = found.family
    runs = family is not None and found.pipeline_class in family.native_pipelines[:1]
    generate = f'porter generate {model} "a prompt"'
    if found.verdict:
        onwards = [generate] if runs else []
        return (onwards or [work]) if found.verdict == "passed" else [f"porter parity {model}", *onwards]
    if found.places:
        return [f"porter plan {model}{pin} --subfolder {shlex.quote(place)}" for place in found.places]
    if absent := pointers(source, (name for part in parts for name in part.files)):
        return [fetch_command(source, absent), again]
    lost = [part.name for part in parts if part.layout == "unknown" and not part.files]
    if lost and source.kind == "folder":
        return [download_command(source, [f"{name}/*" for name in lost]), again]
    if found.bases:
        return [f"porter plan {shlex.quote(base)}" for base in found.bases]
    if any(part.status == "convert" for part in parts):
        return [f"porter convert {model}{pin}{_only(found)} -o {port}"]
    places = [part.location.partition("@")[0] for part in parts if part.location]
    if location := next((place for place in places if re.fullmatch(r"[\w.-]+/[\w./-]+", place)), None):
        return [f"porter plan {shlex.quote('/'.join(location.split('/')[:2]))}"]
    if any(part.status in ("port", "missing") for part in parts) or source.kind == "file":
        return [work]
    if source.kind == "hub":
        return [
            f"hf download {model}{at}{include} --local-dir {shlex.quote(source.name)}",
            f"porter plan {shlex.quote(source.name)}{inner}",
        ]
    return [generate] if runs else [work]


def _only(found: Survey) -> str:
    """The options of a conversion that lacks configs: whose config, or a pipeline that has them all."""
    bare = next((part.name for part in found.components if part.name in found.lacking), None)
    if bare is None:
        return ""
    if len(found.lacking) > 1:
        return " --base OWNER/NAME"
    only = f" --component {shlex.quote(bare)}" if len(found.components) > 1 else ""
    called = re.sub(r"[^A-Z0-9]+", "-", bare.upper()).strip("-")
    return f"{only} --config {called or 'ITS'}-CONFIG.json"
