"""Any adapter as low-rank factors by path: exactly where it is one, else the best of a given rank with its error.

The best approximation of rank r is the truncated SVD (Eckart and Young, 1936, doi:10.1007/BF02288367).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.places import Place
from deltaworks.core.weights import base_tensors, effective, matrix_of
from deltaworks.store.foreign import lost

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
    path: str | None = None  # in the file, where it is not the module's
    stacks: int = 1  # matrices of as many experts, one after the other

    @property
    def rank(self) -> int:
        return len(self.A) // self.stacks

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


def lowered(delta: Delta, rank: int | None = None, kinds: Collection[str] = LOWERED) -> Lowering:
    """The adapter as factors. ``rank`` cuts every change to that rank, and is needed where one is no factors.

    ``kinds`` are those of places that the format can say; a "matrix" has the name of its place instead of a path.

    Raises UserError where it computes what no weight can hold, or where ``rank`` is needed and not given.
    """
    check_base(delta)
    by_path: dict[str, list[Any]] = {}
    for item in method_items(delta):
        for place, tuner in item.all:  # owners of a tied weight each get their own
            by_path.setdefault(place.name, []).append(tuner)
    found = Lowering()
    for path, tuners in by_path.items():
        _check(tuners, kinds)
        if weighing := [tuner for tuner in tuners if _weighs(tuner)]:
            found.weights[path] = _own(delta, weighing) if rank is None else _cut(delta, tuners, rank)
        if any(tuner.gives("bias") for tuner in tuners):
            bias = effective_of(delta, tuners).get(tuners[0].place.bias)
            if bias is not None:
                found.biases[path] = bias
    if not found.weights:
        raise UserError(f"{delta.config} changes no weight of a linear layer, so it is no LoRA")
    return found


def factors_alone(delta: Delta, rank: int | None, reader: str, kinds: tuple[str, ...]) -> dict[str, Lowered]:
    """The adapter as A and B by path. Raises UserError for all that a reader of A and B alone would not see."""
    if any(item.member >= len(delta.members) for item in delta.attached):
        raise UserError(f"{reader} reads no modules that are trained in full ({', '.join(delta.also)}): merge instead")
    if experts := [item.place.name for item in method_items(delta) if item.place.expert is not None]:
        raise UserError(f"{reader} has no names for experts, and {experts[0]!r} is of one: merge instead")
    found = lowered(delta, rank, (*LOWERED, "matrix"))
    if found.biases:
        raise UserError(f"{reader} reads no trained biases, and {next(iter(found.biases))!r} has one: merge instead")
    if odd := [path for path, one in found.weights.items() if one.place.kind not in kinds]:
        raise UserError(f"{reader} takes no adapter at {odd[0]!r}, a {found.weights[odd[0]].place.kind}: merge instead")
    if rank is not None:
        lost(found.loss(rank))
    return found.weights


def check_base(delta: Delta) -> None:
    """Raises UserError where the weights are not the base's, so that no change can be told from them."""
    for other in delta.board.deltas.values():
        if other.merged:
            raise UserError(
                f"adapter {other.name!r} is merged into the weights: unmerge it before {delta.name!r} is written"
            )
    if delta.cut is not None:
        raise UserError(f"{delta.config} cuts the base, which no other format can say")


def method_items(delta: Delta) -> list[Attached]:
    """The tuners of the methods, without what is trained in full beside them."""
    return [item for item in delta.attached if item.member < len(delta.members)]


def effective_of(delta: Delta, tuners: Sequence[Any]) -> dict[str, Any]:
    """The parameters of one module with some of its tuners applied, in float64."""
    module = delta.model.get_submodule(tuners[0].place.path)
    base = {name: None if t is None else t.detach().double() for name, t in base_tensors(module).items()}
    with torch.no_grad():
        return effective(list(tuners), base)


def padded(lowered: Lowered, rank: int) -> Lowered:
    """The same change with ``rank`` rows and columns, the new ones zero; the scale stays."""
    more = rank - lowered.rank
    return replace(lowered, A=F.pad(lowered.A, (0, 0, 0, more)), B=F.pad(lowered.B, (0, more)))


def _weighs(tuner: Any) -> bool:
    return bool(tuner.gives("weight") or tuner.gives("factors"))


def _check(tuners: Sequence[Any], kinds: Collection[str]) -> None:
    for tuner in tuners:
        place = tuner.place
        if tuner.form() == 3:
            raise UserError(
                f"{tuner.config} at {place.name!r} computes something that no weight can hold, so it is no LoRA"
            )
        if tuner.gives("tensor") or (_weighs(tuner) and place.kind not in kinds):
            raise UserError(f"{tuner.config} changes {place.name!r}, a {place.kind}, which no LoRA stands at")


def _own(delta: Delta, tuners: Sequence[Any]) -> Lowered:
    """The tuners' own factors, side by side."""
    place = replace(tuners[0].place, part=None)
    scale, module = 1.0, delta.model.get_submodule(place.path)
    whole = matrix_of(place, base_tensors(module)[place.parameter])
    A, B = [], []
    for tuner in tuners:
        if not tuner.gives("factors"):
            raise UserError(f"{tuner.config} at {place.name!r} is no low-rank change: give a rank to cut it to")
        with torch.no_grad():
            factors = tuner.factors()
        start, stop = tuner.place.part or (0, len(whole))
        own = F.pad(factors.B.detach(), (0, 0, start, len(whole) - stop))  # other outputs of a fused projection: zero
        if len(tuners) == 1 and isinstance(factors.scale, int | float):
            scale = float(factors.scale)
        else:
            own = own * factors.scale
        A.append(factors.A.detach())
        B.append(own)
    return Lowered(place, module, torch.cat(A), torch.cat(B, dim=1), scale)


def _cut(delta: Delta, tuners: Sequence[Any], rank: int) -> Lowered:
    """The best factors of a rank for the change of the weight."""
    place = replace(tuners[0].place, part=None)
    module = delta.model.get_submodule(place.path)
    base = matrix_of(place, base_tensors(module)[place.parameter]).detach().double()
    change = matrix_of(place, effective_of(delta, tuners)[place.parameter]) - base
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    norm, rest = float(S.norm()), float(S[rank:].norm())
    A, B = (root[:, None] * V[:rank]).float(), (U[:, :rank] * root).float()
    return Lowered(place, module, A, B, error=rest / norm if norm else 0.0)
