"""Any adapter as low-rank factors by path: exactly where it is one, else the best of a given rank with its error.

The best approximation of rank r is the truncated SVD (Eckart and Young, 1936, doi:10.1007/BF02288367).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.places import Place
from deltaworks.core.weights import base_tensors, effective, to_matrix

if TYPE_CHECKING:
    from deltaworks.core.building import Attached
    from deltaworks.core.delta import Delta

LOWERED = ("linear", "conv1d", "conv2d", "embedding")
"""The kinds of places whose change can be factors."""


@dataclass
class Lowered:
    """The change ``scale * B @ A`` of one weight, A [r, in], B [out, r] as ``Tuner.weight`` has them.

    ``error`` is ||what was cut off||_F / ||change||_F: 0 where the factors are the adapter's own.
    """

    place: Place
    module: Any
    A: Tensor
    B: Tensor
    scale: float = 1.0
    error: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.A)

    def folded(self) -> Lowered:
        """The same change with a scale of one: B takes it."""
        return replace(self, B=self.B * self.scale, scale=1.0)


@dataclass
class Lowering:
    """All of an adapter by path: factors, and the biases [out] that it changes."""

    weights: dict[str, Lowered] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest relative error of a weight."""
        return max((lowered.error for lowered in self.weights.values()), default=0.0)

    def loss(self, rank: int) -> str:
        """The sentence that says what was cut off."""
        path = max(self.weights, key=lambda path: self.weights[path].error)
        cut = sum(lowered.error > 1e-6 for lowered in self.weights.values())
        return (
            f"rank {rank} holds all but {self.error:.3g} of the change (relative Frobenius norm) where it fits worst, "
            f"in {path}; {cut} of {len(self.weights)} weights lose more than 1e-6"
        )


def lowered(delta: Delta, rank: int | None = None) -> Lowering:
    """The adapter as factors. ``rank`` cuts every change to that rank, and is needed where one is no factors.

    Raises UserError where it computes what no weight can hold, or where ``rank`` is needed and not given.
    """
    by_path: dict[str, list[Attached]] = {}
    for item in method_items(delta):
        by_path.setdefault(item.place.path, []).append(item)
    found = Lowering()
    for path, items in by_path.items():
        _check(delta, items)
        if any(item.tuner.gives("weight") or item.tuner.gives("factors") for item in items):
            found.weights[path] = _own(delta, items) if rank is None else _cut(delta, items, rank)
        if any(item.tuner.gives("bias") for item in items):
            module = delta.model.get_submodule(path)
            bias = effective_of(delta, items).get("bias")
            if bias is not None and bias is not module._parameters.get("bias"):
                found.biases[path] = bias
    if not found.weights:
        raise UserError(f"{delta.config} changes no weight of a linear layer, so it is no LoRA")
    return found


def method_items(delta: Delta) -> list[Attached]:
    """The tuners of the methods, without what is trained in full beside them."""
    return [item for item in delta.attached if item.member < len(delta.members)]


def effective_of(delta: Delta, items: list[Attached]) -> dict[str, Any]:
    """The parameters of one module with some of its tuners applied, in float64."""
    module = delta.model.get_submodule(items[0].place.path)
    base = {name: None if t is None else t.detach().double() for name, t in base_tensors(module).items()}
    with torch.no_grad():
        return effective([item.tuner for item in items], base)


def padded(lowered: Lowered, rank: int) -> Lowered:
    """The same change with ``rank`` rows and columns, the new ones zero; the scale stays."""
    more = rank - lowered.rank
    return replace(lowered, A=F.pad(lowered.A, (0, 0, 0, more)), B=F.pad(lowered.B, (0, more)))


def _check(delta: Delta, items: list[Attached]) -> None:
    for item in items:
        if item.tuner.form() == 3:
            raise UserError(
                f"{item.tuner.config} at {item.key!r} computes something that no weight can hold, so it is no LoRA"
            )
        weighs = item.tuner.gives("weight") or item.tuner.gives("factors")
        if item.tuner.gives("tensor") or (weighs and item.place.kind not in LOWERED):
            raise UserError(
                f"{item.tuner.config} changes {item.place.path!r}, a {item.place.kind}, which no LoRA stands at"
            )


def _own(delta: Delta, items: list[Attached]) -> Lowered:
    """The tuners' own factors, side by side."""
    A, B = [], []
    items = [item for item in items if item.tuner.gives("weight") or item.tuner.gives("factors")]
    scale, module = 1.0, delta.model.get_submodule(items[0].place.path)
    whole = to_matrix(items[0].place.kind, base_tensors(module)["weight"])
    for item in items:
        if not item.tuner.gives("factors"):
            raise UserError(
                f"{item.tuner.config} at {item.key!r} is no low-rank change: a rank must be given to cut it to"
            )
        with torch.no_grad():
            factors = item.tuner.factors()
        start, stop = item.place.part or (0, len(whole))
        own = F.pad(factors.B.detach(), (0, 0, start, len(whole) - stop))  # other outputs of a fused projection: zero
        if len(items) == 1 and isinstance(factors.scale, int | float):
            scale = float(factors.scale)
        else:
            own = own * factors.scale
        A.append(factors.A.detach())
        B.append(own)
    return Lowered(_whole(items[0].place), module, torch.cat(A), torch.cat(B, dim=1), scale)


def _cut(delta: Delta, items: list[Attached], rank: int) -> Lowered:
    """The best factors of a rank for the change of the weight."""
    place = items[0].place
    module = delta.model.get_submodule(place.path)
    base = base_tensors(module)["weight"]
    change = to_matrix(place.kind, effective_of(delta, items)["weight"] - base.detach().double())
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    norm, rest = float(S.norm()), float(S[rank:].norm())
    A, B = (root[:, None] * V[:rank]).float(), (U[:, :rank] * root).float()
    return Lowered(_whole(place), module, A, B, error=rest / norm if norm else 0.0)


def _whole(place: Place) -> Place:
    """The place of the whole fused projection."""
    return Place(place.path, place.role, place.kind, place.stack, place.block)
