"""Sources without a model_index.json: one component's folder, or original files told by their tensor names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from porter.core.errors import BadInputError, UsageError
from porter.core.family import detect, families
from porter.core.layout import find_weights, highlights
from porter.core.plan import ComponentPlan
from porter.core.port import MANIFEST
from porter.core.source import Source
from porter.core.survey import INDEX, Survey, judge, known_component, leftovers, measure, pointer_note


def one_component(source: Source) -> Survey:
    """A folder with one component's config.json and weights."""
    config = source.json("config.json")
    names = [config.get("_class_name"), *(config.get("architectures") or ())] if isinstance(config, dict) else []
    class_name = next((name for name in names if isinstance(name, str)), None)
    if class_name is None:
        raise BadInputError(
            "config.json names no class", expected="`_class_name` or `architectures`", hint="name the pipeline's folder"
        )
    known = known_component(None, "", class_name)
    weights = find_weights(source.files, "")
    library = "diffusers" if "_class_name" in config else "transformers"
    found = Survey(family=next((f for f in families().values() if known in f.components), None))
    found.warnings.append("one component, not a pipeline: there is no model_index.json")
    status = judge(found, known.name if known else "model", library, class_name, "diffusers", known,
                     quantised="quantization_config" in config)  # fmt: skip
    parameters, dtypes = measure(source, weights.files)
    found.components.append(
        ComponentPlan(
            known.name if known else "model",
            library,
            class_name,
            status,
            "diffusers",
            weights.files,
            sum(source.files[name].size for name in weights.files),
            parameters,
            dtypes,
            None,
            highlights(config),
            pointer_note(source, weights.files),
        )
    )
    leftovers(source, found)
    return found


def loose_files(source: Source) -> Survey:
    """Checkpoint files without model_index.json: told by their tensor names."""
    roots = [name for name in source.files if "/" not in name and name.endswith((".safetensors", ".sft"))]
    if not roots:
        _refuse(source)
    found = Survey()
    for name in roots:
        if source.files[name].lfs_pointer:
            source.path(name)  # raises: the tensor names are not here
        header, _ = source.header(name)
        hit = detect(header)
        parameters, dtypes = measure(source, (name,))
        size = source.files[name].size
        if hit is None:
            found.warnings.append(f"{name}: no known layout; its tensors are {_templates(header)}")
            found.components.append(
                ComponentPlan(name, None, None, "port", "unknown", (name,), size, parameters, dtypes, None, {})
            )
            continue
        family, known = hit
        found.family = found.family or family
        config = source.json(f"{known.name}/config.json") if f"{known.name}/config.json" in source.files else {}
        found.components.append(
            ComponentPlan(
                known.name,
                known.library,
                known.class_names[0],
                "convert",
                "original",
                (name,),
                size,
                parameters,
                dtypes,
                known.recipe,
                highlights(config),
                f"told by its tensor names: {family.title}",
            )
        )
    if found.family:
        found.pipeline_class = None
        found.style, found.style_reason = found.family.style, found.family.style_reason
        here = {part.name for part in found.components}
        absent = [part.name for part in found.family.components if part.name not in here]
        found.warnings.append(f"not a whole pipeline; {found.family.title} also has {', '.join(absent)}")
    else:
        found.style_reason = "unknown architecture: nothing is known that would demand a stage of its own"
    return found


def _refuse(source: Source) -> None:
    kept = ", ".join(list(source.files)[:4])
    if source.kind == "file":
        raise BadInputError(
            f"{source.given} is no checkpoint that porter reads", expected="a .safetensors file",
            hint="convert pickles and GGUF files to safetensors first",
        )  # fmt: skip
    if MANIFEST in source.files:
        raise UsageError(f"{source.given} is a port of single components", hint=f"porter parity {source.given}")
    raise BadInputError(
        f"{source.given} is not a pipeline", expected=f"{INDEX}, or .safetensors files", found=kept,
        hint="porter plan <a folder that holds one>",
    )  # fmt: skip


def _templates(keys: Mapping[str, Any], limit: int = 4) -> str:
    """The commonest tensor name templates, numbers replaced by `{i}`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", key) for key in keys)
    shown = ", ".join(name for name, _ in counts.most_common(limit))
    return f"{shown} … ({len(counts)} templates)" if len(counts) > limit else shown or "none"
