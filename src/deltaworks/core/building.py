"""The tuners of a new adapter: one for every place that each of its methods stands around."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.board import Tap
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.places import Place
from deltaworks.core.registry import Config, OnTop
from deltaworks.core.rows import KINDS as ROWED
from deltaworks.core.rows import parse, rows_tuner
from deltaworks.core.sites import Site
from deltaworks.core.ties import Twin, owners, twins
from deltaworks.core.weights import WEIGHT_KINDS, base_tensors


@dataclass
class Attached:
    """One tuner at its place: ``key`` names it in files, ``member`` is its method's position in a composition.

    ``twins`` are what it is in other modules that own its weight.
    """

    key: str
    member: int
    place: Place
    tuner: Tuner
    twins: list[Twin] = field(default_factory=list)

    @property
    def all(self) -> list[tuple[Place, Any]]:
        """The tuner and its twins, each with the place where it acts."""
        return [(self.place, self.tuner), *((twin.place, twin) for twin in self.twins)]


class Builder:
    """Makes the tuners of one adapter; ``taps`` are the values of other modules that they need."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, members: Sequence[Config], seed: int, tied: bool) -> None:
        self.model, self.anatomy, self.members, self.seed, self.tied = model, anatomy, members, seed, tied
        self.shared: dict[Hashable, Any] = {}
        self.taps: list[tuple[nn.Module, Tap]] = []

    def build(self, also: Sequence[str]) -> list[Attached]:
        """Every tuner, with those of the targets that are trained in full. Raises UserError; changes nothing."""
        attached: list[Attached] = []
        for member, config in enumerate(self.members):
            family = type(getattr(self.model, "config", None)).__name__.removesuffix("Config").lower()
            if f"family:{family}" in config.limits:
                sentence = config.limits[f"family:{family}"]
                raise UserError(f"{config.name} does not work on {type(self.model).__name__}: {sentence}")
            made = self._of(config, member)
            if not made and config.kinds:  # a method without kinds acts on the others' tuners
                mend = config.limits.get("nothing", "give targets")
                raise UserError(f"{config} has nothing to tune in {type(self.model).__name__}: {mend}")
            attached += made
        if all(isinstance(config, OnTop) for config in self.members):
            names = "+".join(str(config) for config in self.members)
            raise UserError(f"{names} stands on no method: write it behind one, as in 'lora+{names}'")
        replaced = {item.place.path for item in attached if isinstance(item.tuner, Replacement)}
        for item in self._also(also, replaced):
            item.key += "<also>" * any(item.key == other.key for other in attached)
            attached.append(item)
        whole = {(item.member, item.place.path) for item in attached if item.tuner.gives("tensor")}
        for item in attached:  # what holds a whole module has one twin for another, and none where it stands itself
            item.twins = [twin for twin in item.twins if (item.member, twin.place.path) not in whole]
            whole |= {(item.member, twin.place.path) for twin in item.twins if twin.gives("tensor")}
        return attached

    def _also(self, also: Sequence[str], replaced: set[str]) -> list[Attached]:
        """What is trained in full beside the methods: modules that these do not replace, and rows of others."""
        makers: dict[Place, Any] = {}
        if modules := [item for item in also if parse(item) is None]:
            places = self.anatomy.select(modules, WEIGHT_KINDS)
            makers = {place: Replacement for place in places if place.whole and place.path not in replaced}
        rows: dict[Place, set[int]] = {}
        for target, numbers in filter(None, map(parse, also)):
            for place in self.anatomy.select(target, ROWED):
                for owner in (place, *self._owners(place)):
                    rows.setdefault(owner, set()).update(numbers)
        for place, found in rows.items():
            if place.whole and place not in makers and place.path not in replaced:
                makers[place] = functools.partial(rows_tuner, rows=sorted(found))
        made = (self._make(make, len(self.members), place, None) for place, make in makers.items())
        return [item for item in made if item is not None]

    def _owners(self, place: Place) -> list[Place]:
        """The places of the other modules that own a place's weight, where a change belongs to the weight."""
        paths = [path for path, _ in owners(self.anatomy, place.path, place.parameter)] if self.tied else []
        return [other for other in self.anatomy.places if other.path in paths and other.kind in ROWED and other.whole]

    def _of(self, config: Config, member: int) -> list[Attached]:
        """The tuners of one method: one for each weight, whichever of its owners are targets."""
        made: list[Attached] = []
        tuned: set[tuple[str, Any]] = set()  # matrices that the tuners of other owners change
        for place in config.places(self.anatomy):
            if (place.name, place.part) in tuned:
                continue
            if (item := self._make(config.tuner, member, place, config)) is not None:
                made.append(item)
                tuned |= {(twin.place.name, twin.place.part) for twin in item.twins if not twin.gives("tensor")}
        return made

    def _make(self, make: Any, member: int, place: Place, config: Any) -> Attached | None:
        site = Site(place, self.model, self.anatomy, self.seed, self.shared)
        site.member = member
        if place.kind == "trunk" and "inputs_embeds" not in inspect.signature(site.module.forward).parameters:
            raise UserError(
                f"{place.path!r} of {type(self.model).__name__} makes its embeddings itself, so no virtual tokens can "
                "stand before them: give other targets or another method"
            )
        tuner: Tuner | None = make(site)
        if tuner is None:
            return None
        if place.kind == "matrix" and (unfit := _unfit(tuner, site)):
            raise UserError(
                f"{config} {unfit[0]}, but {place.name!r} is one matrix of a module that multiplies it in its own way: "
                f"{unfit[1]}, or other targets"
            )
        tuner.place, tuner.config = place, config
        tuner.train(self.model.training)
        self.taps += site.taps
        key = place.name or "(model)"
        if place.part is not None:
            key += f"[{place.role}]"
        if sum(bool(other.kinds) for other in self.members) > 1 and member < len(self.members):
            key += f"<{member}>"
        return Attached(key, member, place, tuner, twins(self.model, self.anatomy, tuner) if self.tied else [])


def _unfit(tuner: Tuner, site: Site) -> tuple[str, str] | None:
    """What a tuner does that no single matrix of a module can hold, and the mend."""
    if tuner.form() == 3:
        return "changes what a layer computes, not its weight", "give a method that changes weights"
    if tuner.dropout:
        return "has dropout before the layer", "set dropout=0"
    if tuner.gives("bias") and site.place.bias not in base_tensors(site.module) and tuner.bias(None) is not None:
        return "adds a bias, for which the module has no place", "give options without it"
    return None
