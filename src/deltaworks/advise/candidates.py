"""The methods that may be advised, and the facts of each that rules ask for: nothing here knows a method by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaworks.core.abilities import Ability, abilities
from deltaworks.core.registry import Config, configure, registry


@dataclass(frozen=True)
class Candidate:
    """A method with what the registry and small probes tell of it."""

    name: str
    config: type[Config]
    facts: Mapping[str, Any]


@functools.cache
def candidates() -> tuple[Candidate, ...]:
    """Every registered method."""
    known = registry()
    return tuple(Candidate(each.name, known[each.name], _facts(known[each.name], each)) for each in abilities())


def _facts(config: type[Config], found: Ability) -> dict[str, Any]:
    parts = configure(config.name).parts()
    return {
        "name": found.name,
        "family": found.family,
        "kinds": tuple({*config.kinds, *(kind for part in parts for kind in part.kinds)}),
        "form": found.form,
        "merges": found.merge is None,
        "cannot_merge": found.merge,
        "rows": found.rows is None,
        "cannot_rows": found.rows,
        "over_time": any(type(part).procedure is not Config.procedure for part in parts),
    }


def composed(spec: str) -> Candidate:
    """A composition such as "prefix+parallel": it can do what all of its members can. Raises UserError."""
    config = configure(spec)
    known = {each.name: each.facts for each in candidates()}
    members = [known[part.name] for part in config.parts()]
    facts: dict[str, Any] = {
        "name": spec,
        "family": tuple(member["family"] for member in members),
        "kinds": tuple({kind for member in members for kind in member["kinds"]}),
        "form": max(member["form"] or 3 for member in members),
        "over_time": any(member["over_time"] for member in members),
    }
    for able in ("merges", "rows"):
        facts[able] = all(member[able] for member in members)
    for reason in ("cannot_merge", "cannot_rows"):
        facts[reason] = next((member[reason] for member in members if member[reason]), None)
    return Candidate(spec, type(config), facts)
