"""A component's config, made whole: what is given, checked; what the tensors show; what neither says, asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from porter.core.errors import RecipeError

_HINT = "porter convert … --config FILE, with {} in it"


@dataclass(frozen=True)
class ConfigFacts:
    """What a target class's config may hold.

    Attributes:
        class_name: the class that a conversion writes for.
        keys: every key of its config that a conversion understands.
        needed: keys that no tensor shows and that every result depends on: they must be given.
        defaults: what a config.json of the class means by leaving a key out. Without a config.json a needed key is
            still asked for.
        assumed: keys that no tensor shows and no result depends on, with the values of the released models.
        aliases: the original code's names for keys.
        fixed: facts that the class cannot express otherwise.
    """

    class_name: str
    keys: tuple[str, ...]
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def complete(
        self, given: Mapping[str, Any], seen: Mapping[str, Any], released: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The full config, with `_class_name`; keys that were assumed stand under `_assumed` too.

        Args:
            given: a config.json of the class, or what a user knows, in its keys or the original code's.
            seen: what the tensors show. A key whose value is None there may be anything that is given.
            released: what released models of these sizes say; never taken, only named where a key is asked for.

        Raises:
            RecipeError: a key is unknown, missing, given twice with two values, or contradicts the tensors.
        """
        known = self._translated(given)
        if "_class_name" in given:
            known = {**self.defaults, **known}
        for key, value in seen.items():
            if key in known and value is not None and _plain(known[key]) != _plain(value):
                raise RecipeError(
                    f"{self.class_name}: the config's {key} does not fit the tensors",
                    expected=f"{key}: {_plain(value)} (from the tensors)",
                    found=f"{key}: {known[key]} (from the config)", hint="give the right one with --config FILE",
                )  # fmt: skip
        absent = [key for key in self.needed if key not in known]
        if absent:
            names = " and ".join(absent)
            raise RecipeError(
                f"{self.class_name}: the tensors do not say {names}", expected=f"{names} in the config",
                found="no such key", hint=_HINT.format(names) + suggested(absent, released or {}),
            )  # fmt: skip
        assumed = {key: value for key, value in self.assumed.items() if key not in known and key not in seen}
        shown = {key: value for key, value in seen.items() if value is not None or key not in known}
        full = {"_class_name": self.class_name, **known, **shown, **assumed}
        full = {key: list(value) if isinstance(value, tuple) else value for key, value in full.items()}
        return full | ({"_assumed": dict(assumed)} if assumed else {})

    def check_axes(self, full: Mapping[str, Any], key: str, width: int) -> None:
        """Refuse sizes of rotary axes, under `key` of a full config, that do not fill a head of `width` channels."""
        axes = full[key]
        if not isinstance(axes, list) or not all(type(axis) is int for axis in axes) or sum(axes) != width:
            raise RecipeError(
                f"{self.class_name}: {key} does not fit the heads", expected=f"sizes with sum {width}",
                found=f"{key}: {axes}", hint=_HINT.format(key),
            )  # fmt: skip

    def _translated(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` in the class's own keys, without private ones."""
        named = given.get("_class_name", self.class_name)
        if named != self.class_name:
            raise RecipeError(f"the config is of {named}", expected=self.class_name, found=str(named))
        known: dict[str, Any] = {}
        for key, value in given.items():
            ours = self.aliases.get(key, key)
            if ours in self.fixed:
                if value != self.fixed[ours]:
                    raise RecipeError(
                        f"{self.class_name} cannot express {key}", expected=f"{key}: {self.fixed[ours]}",
                        found=f"{key}: {value}",
                    )  # fmt: skip
            elif key.startswith("_"):
                continue
            elif ours not in self.keys:
                raise RecipeError(
                    f"{self.class_name}: the config has an unknown key {key}", expected=", ".join(self.keys),
                    found=f"{key}: {value}"[:200],
                )  # fmt: skip
            elif ours in known and known[ours] != value:
                raise RecipeError(f"the config says {ours} twice", expected=f"{known[ours]}", found=f"{key}: {value}")
            else:
                known[ours] = value
        return known


def suggested(keys: Iterable[str], released: Mapping[str, Any]) -> str:
    """What released models of the same sizes say of some keys, for a hint; empty where nothing is known."""
    known = {key: _plain(released[key]) for key in keys if key in released}
    return f"; released models of these sizes have {json.dumps(known)}" if known else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
