"""The tuners of a new adapter: one for every place that each of its methods stands around."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.board import Tap
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.places import Place
from deltaworks.core.registry import Config, OnTop
from deltaworks.core.sites import Site
from deltaworks.core.weights import WEIGHT_KINDS, base_tensors


@dataclass
class Attached:
    """One tuner at its place: ``key`` names it in files, ``member`` is its method's position in a composition."""

    key: str
    member: int
    place: Place
    tuner: Tuner


class Builder:
    """Makes the tuners of one adapter; ``taps`` are the values of other modules that they need."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, members: Sequence[Config], seed: int) -> None:
        self.model, self.anatomy, self.members, self.seed = model, anatomy, members, seed
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
            made = [self._make(config.tuner, member, place, config) for place in config.places(self.anatomy)]
            if not any(made) and config.kinds:  # a method without kinds acts on the others' tuners
                mend = config.limits.get("nothing", "give targets")
                raise UserError(f"{config} has nothing to tune in {type(self.model).__name__}: {mend}")
            attached += [item for item in made if item is not None]
        if all(isinstance(config, OnTop) for config in self.members):
            names = "+".join(str(config) for config in self.members)
            raise UserError(f"{names} stands on no method: write it behind one, as in 'lora+{names}'")
        replaced = {item.place.path for item in attached if isinstance(item.tuner, Replacement)}
        for place in self.anatomy.select(also, WEIGHT_KINDS) if also else []:
            if place.whole and place.path not in replaced:
                item = self._make(Replacement, len(self.members), place, None)
                assert item is not None
                item.key += "<also>" * any(item.key == other.key for other in attached)
                attached.append(item)
        return attached

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
        return Attached(key, member, place, tuner)


def _unfit(tuner: Tuner, site: Site) -> tuple[str, str] | None:
    """What a tuner does that no single matrix of a module can hold, and the mend."""
    if tuner.form() == 3:
        return "changes what a layer computes, not its weight", "give a method that changes weights"
    if tuner.dropout:
        return "has dropout before the layer", "set dropout=0"
    if tuner.gives("bias") and site.place.bias not in base_tensors(site.module) and tuner.bias(None) is not None:
        return "adds a bias, for which the module has no place", "give options without it"
    return None
