"""Tied weights: one tensor that several modules own has one tuner, and its change acts in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.paths import name_of, parent_of
from deltaworks.core.places import Place


class Twin(nn.Module):
    """A tuner as another owner of its weight sees it: the same change, and nothing else of it.

    ``names`` are the tied parameters: their names here and at the tuner's own place. An embedding holds the
    transpose of the matrix that a linear layer multiplies, so there the change is ``turned``.
    """

    def __init__(self, tuner: Tuner, place: Place, names: dict[str, str]) -> None:
        super().__init__()
        self.tuner, self.place, self.names = tuner, place, names
        self.turned = _is_turned(place) != _is_turned(tuner.place)
        if self.turned and place.part is not None:
            raise UserError(f"{place.name!r} is tied to the transpose of {tuner.place.name!r}: target the whole of it")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tuner"), name)

    def forward(self, form: str, *arguments: Any) -> Any:
        """As that of a tuner."""
        return getattr(self, form)(*arguments)

    def gives(self, form: str) -> bool:
        own = form != "around" and (form != "bias" or self.place.bias in self.names)
        return own and self.tuner.gives(form)

    def form(self) -> int:
        return self.tuner.form()

    def factors(self) -> Factors:
        A, B, scale = self.tuner.factors()
        return Factors(B.mT, A.mT, scale) if self.turned else Factors(A, B, scale)

    def selecting(self) -> Factors | None:
        return None if self.turned else self.tuner.selecting()

    def weight(self, weight: Tensor) -> Tensor:
        return self.tuner.weight(weight.mT).mT if self.turned else self.tuner.weight(weight)

    def tensor(self, name: str, base: Tensor) -> Tensor:
        return self.tuner.tensor(self.names[name], base) if name in self.names else base


def _is_turned(place: Place) -> bool:
    return place.turned or place.kind in ("conv1d", "embedding")


def owners(anatomy: Anatomy, path: str, name: str) -> Iterator[tuple[str, str]]:
    """(path, parameter) of every other owner of a parameter."""
    full = f"{path}.{name}".lstrip(".")
    for group in anatomy.tied:
        if full in group:
            yield from ((parent_of(other), name_of(other)) for other in group if other != full)


def twins(model: nn.Module, anatomy: Anatomy, tuner: Any) -> list[Twin]:
    """A tuner's twins: one for each other module that owns a parameter that it changes."""
    place: Place = tuner.place
    module = model.get_submodule(place.path)
    if tuner.form() == 3 or not tuner.tied:
        return []
    changed = {place.parameter} if tuner.gives("weight") or tuner.gives("factors") else set()
    changed |= {place.bias} if tuner.gives("bias") else set()
    changed |= {name for name, _ in module.named_parameters(recurse=False)} if tuner.gives("tensor") else set()
    names: dict[str, dict[str, str]] = {}
    for own in sorted(changed):
        for path, name in owners(anatomy, place.path, own):
            if model.get_submodule(path) is not module:
                names.setdefault(path, {})[name] = own
    return [Twin(tuner, _place(anatomy, place, path, tied), tied) for path, tied in names.items()]


def _place(anatomy: Anatomy, like: Place, path: str, names: dict[str, str]) -> Place:
    """The place at another owner that corresponds to the place ``like``."""
    parameter = next((name for name, own in names.items() if own == like.parameter), like.parameter)
    there = [place for place in anatomy.places if place.path == path and place.parameter == parameter]
    there = [place for place in there if place.expert == like.expert and place.kind not in ("sublayer", "block")]
    fitting = [place for place in there if place.part == like.part]
    return replace((fitting or there)[0], part=like.part)
