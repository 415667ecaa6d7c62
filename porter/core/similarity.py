"""The closest known family of a pipeline, with a structural similarity and the differences that matter.

The score is the mean over the roles that both have or either lacks (denoiser, autoencoder, encoders, scheduler; roles
that the family's pipeline runs without do not count), each
weighted by how much of a port it is: 5 for a denoiser, 2 for an autoencoder, 1 for everything else. A role counts 1
where both name the same class (half, where several families have that class in other sizes and no header tells), and
for models of different classes the share of tensor name templates (where headers
are here) or of constructor parameters that the two have in common. Four fifths of that is the 80 % rule: a family that
covers so much is reused or extended, anything less is a family of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from porter.core.architectures import Guess, architectures, guesses, shapes_of
from porter.core.defaults import class_source
from porter.core.family import Family, families
from porter.core.layout import highlights
from porter.core.libraries import pipeline_components, pipeline_optional
from porter.core.plan import ComponentPlan, Kin
from porter.core.survey import Survey

RULE = 0.8
FLOOR = 0.3  # below this, the closest family is no help
SHARED = 0.5  # what the same class counts where families differ by its config alone
_MODEL = re.compile(r"(Model|Transformer|UNet|Autoencoder|VAE|VQ)")
_DENOISER = re.compile(r"^(transformer|unet|prior|decoder|denoiser|[a-z]+_dit)(_\d)?$")
_AUTOENCODER = re.compile(r"^(audio_)?(vae|vqvae|vqgan|movq|autoencoder)(_\d)?$")
_SECONDARY = re.compile(r"(tokenizer|processor|feature_extractor|safety_checker|watermarker)")


def closest(found: Survey) -> Kin | None:
    """The family that covers most of `found`; None where none covers enough to be worth a look."""
    parts = {part.name: part for part in found.components if not _SECONDARY.search(part.name)}
    if found.places:  # several pipelines: each has its own
        return None
    if found.family is None and found.pipeline_class is None:
        return _nearest(parts)
    if not any(part.class_name or part.guesses for part in parts.values()):
        return None
    if found.family:
        return _kin(found, found.family, parts)
    ranked = sorted((_kin(found, family, parts) for family in families().values()), key=lambda kin: -kin.score)
    return ranked[0] if ranked and ranked[0].score >= FLOOR else None


def _nearest(parts: Mapping[str, ComponentPlan]) -> Kin | None:
    """For checkpoints of no known layout: the family of the architecture that the largest one comes closest to."""
    unknown = [part for part in parts.values() if part.layout == "unknown" and part.guesses]
    largest = max(unknown, key=lambda part: part.bytes, default=None)
    guess = next((g for g in largest.guesses if g["family"] in families()), None) if largest else None
    if largest is None or guess is None or guess["score"] < FLOOR:
        return None
    family = families()[guess["family"]]
    told = [f"{guess['component']} ({guess['class']}): {guess['score']:.0%} of the tensor names agree"]
    told += [f"lacks {name}" for name in guess["missing"]] + [f"has {name}" for name in guess["extra"]]
    return Kin(family.name, family.title, guess["score"], guess["score"] >= RULE, tuple(told))


def _kin(found: Survey, family: Family, parts: Mapping[str, ComponentPlan]) -> Kin:
    own = found.pipeline_class if found.pipeline_class in family.pipeline_classes else None
    theirs = dict(family_roles(family))
    pipeline = own or next(iter(family.pipeline_classes), "")
    asked, optional = pipeline_components(pipeline), pipeline_optional(pipeline)
    for role, wanted in (asked or {}).items():
        if role in theirs or role in parts:
            kept = [name for name in wanted if not name.endswith("Schedulers")]  # an enumeration of classes
            theirs[role] = tuple(dict.fromkeys((*kept, *theirs.get(role, ()))))
    if found.pipeline_class is None:  # loose files: only what is here can be compared
        theirs = {role: names for role, names in theirs.items() if role in parts}
    total = score = 0.0
    differences: list[str] = []
    for role in dict.fromkeys([*parts, *theirs]):
        if _SECONDARY.search(role):
            continue
        weight = 5.0 if _DENOISER.match(role) else 2.0 if _AUTOENCODER.match(role) else 1.0
        part, names = parts.get(role), theirs.get(role)
        if part is None:
            if role in optional or (asked and role not in asked):
                continue  # the pipeline runs without it
            weight /= 2
            differences.append(f"{role}: {family.title} has {' or '.join(names or ())}, this has none")
            share = 0.0
        elif not names:
            differences.append(f"{role}: {part.class_name or 'unknown'} is not in {family.title}")
            share = 0.0
        else:
            share, told = _share(found, part, names, family)
            if told:
                differences.append(f"{role}: {told}")
        total += weight
        score += weight * share
    for part in parts.values():
        if found.family and _DENOISER.match(part.name) and part.name in found.headers and part.model is None:
            said = ", ".join(f"{key} {value}" for key, value in highlights(part.config, 5).items())
            differences.append(f"{part.name}: the shapes of no released model{f' ({said})' if said else ''}")
    value = round(score / total, 3) if total else 0.0
    return Kin(family.name, family.title, value, value >= RULE, tuple(differences[:12]))


def _share(found: Survey, part: ComponentPlan, names: tuple[str, ...], family: Family) -> tuple[float, str]:
    """(0 to 1, difference) of a component against the classes a family has for its role."""
    if part.class_name in names:
        if found.family or len(_homes(part.class_name)) < 2:
            return 1.0, ""
        # One class in several families is proof of none of them: its tensors are.
        near = _near(found, part.name)[:1] if part.name in found.headers else []
        if near and near[0].architecture.family == family.name:
            return near[0].score, ""
        return SHARED, f"{part.class_name}, which several families have in other sizes"
    if part.class_name and part.class_name.removesuffix("Fast") in {name.removesuffix("Fast") for name in names}:
        return 1.0, ""
    if "Scheduler" in (part.class_name or ""):
        return 0.5, f"{part.class_name}, where {family.title} has {names[0]}"
    said = f"{part.class_name or 'unknown'}, where {family.title} has {names[0]}"
    if part.name in found.headers:
        near = _near(found, part.name)
        best = next(
            (g for g in near if family.name == g.architecture.family or g.architecture.class_name in names), None
        )
        return (best.score, f"{said}; {best.score:.0%} of the tensor names agree") if best else (0.0, said)
    if part.class_name and part.library == "diffusers" and _MODEL.search(part.class_name):
        ours = class_source("diffusers", part.class_name)
        other = class_source("diffusers", names[0])
        if other is not None:
            own = set(ours.defaults) | set(ours.required) if ours else {k for k in part.config if not k.startswith("_")}
            rival = set(other.defaults) | set(other.required)
            both = len(own & rival) / max(1, len(own | rival))
            # Parameters in common say less than names in common: half of it counts.
            return both / 2, f"{said}; {both:.0%} of the constructor's parameters agree"
    return 0.0, said


def _near(found: Survey, name: str) -> list[Guess]:
    """The architectures nearest to a component; computed once, as every family asks."""
    if name not in found.near:
        found.near[name] = guesses(shapes_of(found.headers[name]), 12)
    return found.near[name]


@cache
def _homes(class_name: str) -> frozenset[str]:
    """Families with a denoiser of this class."""
    return frozenset(
        name for name in families()
        if any(class_name in names for role, names in _roles(name).items() if _DENOISER.match(role))
    )  # fmt: skip


@cache
def _roles(name: str) -> Mapping[str, tuple[str, ...]]:
    family = families()[name]
    found: dict[str, tuple[str, ...]] = {part.name: part.class_names for part in family.components}
    for known in architectures():
        if known.family == name and known.layout == "diffusers":
            have = found.get(known.component, ())
            found[known.component] = tuple(dict.fromkeys((*have, known.class_name)))
    return {role: names for role, names in found.items() if not _SECONDARY.search(role)}


def family_roles(family: Family) -> Mapping[str, tuple[str, ...]]:
    """Role -> class names of a family: its record, with the classes of its recorded layouts."""
    return _roles(family.name)
