"""Why a component is `port`, and what a conversion lacks: the words of its note, told from what was found of it."""

from __future__ import annotations

from collections.abc import Mapping

from porter.core.checkpoint import TensorInfo
from porter.core.companions import part as companions_of
from porter.core.errors import PorterError
from porter.core.family import families, resolve
from porter.core.layout import weightless
from porter.core.libraries import LIBRARIES, library_has, pipeline_module_has
from porter.core.plan import ComponentPlan
from porter.core.pointers import pointers
from porter.core.source import Source
from porter.core.survey import Survey


def explain(source: Source, found: Survey) -> None:
    """Gives every component's note its reason, and notes which conversions lack a config (`Survey.lacking`)."""
    for number, part in enumerate(found.components):
        said = ""
        if part.status == "port":
            said = _why(source, found, part)
        elif part.status == "convert" and not part.config and part.recipe:
            said = found.lacking[part.name] = _lacks(part.recipe, found.headers.get(part.name))
            if not said:
                del found.lacking[part.name]
        if said and said not in part.note:
            found.components[number] = part.replace(note="; ".join(filter(None, (part.note, said))))


def _why(source: Source, found: Survey, part: ComponentPlan) -> str:
    """Why nothing takes a component as it is."""
    header, name = found.headers.get(part.name), part.class_name or ""
    if header and companions_of(header).factors > len(header) // 2:
        return _lora(found, header)
    if part.custom_code:
        return f"its class is code of its own ({part.custom_code}), which was not run"
    if part.quantised:
        return f"quantised ({part.quantised}): no recipe takes it"
    if part.layout == "unread":
        return "in no format that porter reads"
    if part.library and part.library not in LIBRARIES and not pipeline_module_has(part.library, name):
        return f"the installed diffusers.pipelines.{part.library} has no class {name}"
    if part.library in LIBRARIES and name and library_has(part.library, name) is False:
        return f"the installed {part.library} has no class {name}, and the catalogue no recipe for it"
    if name.endswith("Pipeline") and part.layout == "diffusers":
        return f"{name} is a pipeline, and its folder holds a component's weights"
    if pointers(source, part.files):
        return "its layout cannot be told before its weights are fetched" if not name else "no recipe for this layout"
    if part.layout == "unknown" and not part.files:
        return "" if weightless(name) else "no weights here"
    if part.layout == "unknown":
        best = part.guesses[0]["score"] if part.guesses else 0.0
        near = f"the nearest has {best:.0%} of the tensor names in common" if best >= 0.01 else "none is near"
        return f"no layout of the catalogue: {near}"
    return "no recipe takes this layout, and no installed class reads it"


def _lora(found: Survey, header: Mapping[str, TensorInfo]) -> str:
    """What a LoRA's factors are for; tells the survey."""
    from porter.core.adapters import adapted

    found.factors = True
    near, share = adapted(header)
    if not near:
        return "factors of a LoRA, no model's own weights: fuse them into their model, then plan that"
    named = [f"{families()[known.family].title} ({known.class_name})" for known in near[:3] if known.family]
    repos = (next((variant.repo for variant in known.variants if variant.repo), None) for known in near[:3])
    found.bases = tuple(repo for repo in repos if repo)
    return (
        f"factors of a LoRA for {' or '.join(named) or near[0].class_name}: {share:.0%} of the names that they change "
        f"are {'theirs' if len(named) > 1 else 'its'}; fuse them into their model, then plan that"
    )


def _lacks(recipe: str, header: Mapping[str, TensorInfo] | None) -> str:
    """What a recipe needs to know beside the tensors; empty where they say it all."""
    from porter.core.recipe import Recipe

    made = resolve(recipe)
    if not isinstance(made, Recipe) or header is None:
        return "its class needs a config.json"
    try:
        made.infer_config(header, {})
    except PorterError as error:
        return f"its conversion needs a config.json, --config FILE: {error.what}"
    return ""
