"""What is known of a model for a checklist: its names, the conditions of steps, and the words that fill them."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from porter.core.family import Family, families
from porter.core.libraries import LIBRARIES
from porter.core.plan import ComponentPlan, PortPlan
from porter.core.targets import Target
from porter.core.targets.names import Names, Role, class_of, derive, role, shown, snake, source_name, stem

Owner = Literal["known", "borrowed", "new"]
_HEAVY: tuple[Role, ...] = ("denoiser", "vae", "encoder", "other")


@dataclass(frozen=True)
class Piece:
    """Components that a step is about: one, or several of one class in one state.

    Attributes:
        owner: `known` to the framework, `borrowed` from a library that it uses as it is, or `new`.
        where: the framework's file that has a known class.
    """

    parts: tuple[ComponentPlan, ...]
    role: Role
    class_name: str
    owner: Owner
    where: str = ""

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @property
    def original(self) -> bool:
        """Whether its weights are here and not in the diffusers layout."""
        return any(part.files and part.layout in ("original", "unknown") for part in self.parts)


# The groups of components that steps speak of, besides the roles.
_GROUPS: Mapping[str, Callable[[Piece], bool]] = {
    "known": lambda piece: piece.owner == "known" and piece.role != "processor",
    "borrowed": lambda piece: piece.owner == "borrowed",
    "converted": lambda piece: piece.role in _HEAVY and all(part.layout == "diffusers" for part in piece.parts),
    "original": lambda piece: piece.role in _HEAVY and piece.original,
    "traced": lambda piece: piece.role in ("denoiser", "vae"),
    "parted": lambda piece: piece.role in _HEAVY,
}


@dataclass(frozen=True)
class Facts:
    """A plan seen from one framework; built by `facts_of`."""

    plan: PortPlan
    target: Target
    names: Names
    family: Family | None
    every: tuple[Piece, ...]
    notes: tuple[str, ...]

    # --- conditions ---------------------------------------------------------------------------------------------------

    @cached_property
    def conditions(self) -> Mapping[str, bool]:
        """The conditions that hold for the whole model."""
        known = self.names.pipeline in self.target.pipelines
        original = any(piece.original for piece in self.every)
        return {
            "known_pipeline": known,
            "new_pipeline": not known,
            "named": self.plan.pipeline_class is not None,
            "hub": self.plan.kind == "hub",
            "hybrid": self.plan.style == "Hybrid",
            "original": original,
            "code": not known or any(piece.owner == "new" for piece in self.every),
            "work": not known or original or any(piece.owner == "new" for piece in self.every),
        }

    def holds(self, when: Iterable[str], piece: Piece | None) -> bool:
        """Whether all of `when` holds, `!` negating."""
        facts = dict(self.conditions)
        if piece is not None:
            facts |= {
                "new": piece.owner == "new",
                "unet": "UNet" in piece.class_name,
                "library": all(part.library in LIBRARIES for part in piece.parts),
            }
        return all(facts[name.lstrip("!")] is not name.startswith("!") for name in when)

    def pieces(self, group: str, when: Iterable[str]) -> tuple[Piece, ...]:
        """The components of a role, or of one of the groups that steps speak of."""
        chosen = _GROUPS.get(group)
        wanted = [piece for piece in self.every if (chosen(piece) if chosen else piece.role == group)]
        return tuple(piece for piece in wanted if self.holds(when, piece))

    def together(self, pieces: Sequence[Piece]) -> Piece:
        """Several components as one, for a step that names them all."""
        parts = tuple(part for piece in pieces for part in piece.parts)
        return Piece(parts, pieces[0].role, pieces[0].class_name, pieces[0].owner)

    # --- names --------------------------------------------------------------------------------------------------------

    @property
    def called(self) -> str:
        """What to call the model in a heading."""
        return self.plan.pipeline_class or source_name(self.plan) or self.names.prefix

    @property
    def native(self) -> bool:
        """Whether the runtime has this pipeline."""
        return self.family is not None and self.names.pipeline in self.family.native_pipelines

    @property
    def folder(self) -> str:
        """The family's folder in the catalogue: its own, or a new one's name."""
        if self.family:
            return self.family.name
        name = self.names.model
        while name in families() or (_catalogue() / "conversions" / name).exists():
            name += "_new"
        return name

    def paths(self, piece: Piece | None) -> dict[str, str]:
        """Names that are safe as parts of a path."""
        names = self.names
        values = {
            "prefix": names.prefix,
            "model": names.model,
            "kebab": names.model.replace("_", "-"),
            "task_model": f"{names.model}_{names.task}" if names.task else names.model,
            "pipeline": names.pipeline,
            "family": self.folder,
        }
        if piece is not None:
            values |= {
                "class": piece.class_name,
                "stem": stem(piece.class_name, names),
                "file": snake(re.sub("Model$", "", piece.class_name)),
                "slug": snake(piece.parts[0].name)[:60] or piece.role,
            }
        return values

    def texts(self, piece: Piece | None) -> dict[str, str]:
        """Names for a step's words. Those of strangers have neither backticks nor line breaks."""
        plan = self.plan
        values = self.paths(piece) | {
            "source": shown(plan.source),
            "style_words": f"`{plan.style or 'Modular'}`",
            "style_reason": shown(plan.style_reason, 120),
            "modules": listed(part.name for part in plan.components),
        }
        if piece is not None:
            values |= {
                "name": shown(piece.name),
                "library": shown(piece.parts[0].library or "its library"),
                "names": listed(part.name for part in piece.parts),
                "classes": self._classes(piece.parts),
            }
        return values

    def commands(self, piece: Piece | None) -> dict[str, str]:
        """Names for a step's command, quoted for a shell; a command that cannot be given yet is empty."""
        plan = self.plan
        pin = f" --revision {shlex.quote(plan.revision)}" if plan.kind == "hub" and plan.revision else ""
        convert = next((line for line in plan.next if line.startswith("porter convert ")), "")
        parity = next((line for line in plan.next if line.startswith("porter parity ")), "")
        generate = next((line for line in plan.next if line.startswith("porter generate ")), "")
        if convert and not parity:
            port = shlex.quote(shlex.split(convert)[-1])
            parity = f"porter parity {port}" if self.family and self.family.cases else ""
            generate = f'porter generate {port} "a prompt"'
        return self.paths(piece) | {
            "plan": f"porter plan {shlex.quote(plan.source)}{pin}",
            "convert": f"{convert} --verify" if convert else "",
            "parity": parity,
            "generate": generate if self.native else "",
        }

    def _classes(self, parts: Iterable[ComponentPlan]) -> str:
        """Classes, each with the framework's file where it has one."""
        found = {}
        for part in parts:
            name = shown(part.class_name or part.name)
            file = self.target.classes.get(part.class_name or "", "").removeprefix(self.target.root)
            found[name] = f"`{name}` (`{file}`)" if file else f"`{name}`"
        return ", ".join(found.values())

    def exists(self, path: str) -> bool:
        """Whether the framework has a file of this path."""
        return path in self.target.files if self.target.commit else (_catalogue() / path).is_file()


def facts_of(plan: PortPlan, target: Target) -> Facts:
    """What `target`'s steps ask of `plan`."""
    family = families().get(plan.family or "")
    names, notes = derive(plan), []
    if not names.chosen and plan.pipeline_class is None and family:
        names = derive_from(plan, family)
        notes.append(f"The source names no pipeline: `{names.pipeline}` is the plainest of {family.title}.")
    elif not names.chosen:
        given = plan.pipeline_class
        said = f"`{shown(given)}` is no pipeline's name" if given else "No pipeline class names it"
        notes.append(
            f"{said}: `{names.prefix}` and `{names.model}` come from what it is called; choose the names first."
        )
    pieces: dict[tuple[object, ...], Piece] = {}
    for part in plan.components:
        class_name, own = class_of(part, names)
        kind = role(part)
        piece = Piece((part,), kind, class_name, *_owner(part, kind, class_name, own, target))
        key = (class_name, kind, part.library, part.status, part.layout, part.recipe)
        pieces[key] = Piece((*pieces[key].parts, part), *_rest(piece)) if key in pieces else piece
        if not own and kind != "processor" and part.class_name is None:
            notes.append(f"`{shown(part.name)}` names no class: `{class_name}` is a proposal.")
        if part.library and part.library not in LIBRARIES and piece.owner == "new":
            notes.append(
                f"`{shown(part.name)}`: `{shown(f'{part.library}.{part.class_name}')}` is code of the repository."
            )
    return Facts(plan, target, names, family, tuple(pieces.values()), tuple(dict.fromkeys(notes)))


def derive_from(plan: PortPlan, family: Family) -> Names:
    """The names of a family's plainest pipeline, for a file that names none."""
    return derive(replace(plan, pipeline_class=family.pipeline_classes[0]))


def _owner(part: ComponentPlan, kind: Role, class_name: str, own: bool, target: Target) -> tuple[Owner, str]:
    if own and class_name in target.classes:
        return "known", target.classes[class_name]
    if kind == "processor" and part.library in LIBRARIES:
        return "borrowed", ""
    if kind in ("encoder", "processor", "scheduler") and part.library in target.libraries:
        return "borrowed", ""
    return "new", ""


def _rest(piece: Piece) -> tuple[Role, str, Owner, str]:
    return piece.role, piece.class_name, piece.owner, piece.where


def listed(names: Iterable[str]) -> str:
    """Names as code spans, each once."""
    return ", ".join(f"`{shown(name)}`" for name in dict.fromkeys(names))


def _catalogue() -> Path:
    """The folder that `conversions/` lies in; in a checkout, `tests/` lies there as well."""
    return Path(importlib.import_module("conversions").__path__[0]).parent
