"""Weights as the matrices that tuners see, and the effective parameters of a module with its tuners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.forms import Factors
from deltaworks.core.places import Place
from deltaworks.core.quantized import dense_weight, is_quantized

WEIGHT_KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm", "parameters", "matrix")


def base_tensors(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by name, as they are in the base; a quantized weight as a plain tensor."""
    if is_quantized(module):
        return {"bias": module._buffers.get("bias"), **module._parameters, "weight": dense_weight(module)}
    return dict(module._parameters)


def to_matrix(kind: str, weight: Tensor) -> Tensor:
    """A weight as [out, in]: Conv1D and embeddings are stored transposed, convolutions have more dimensions."""
    if kind in ("conv1d", "embedding"):
        return weight.t()
    return weight.flatten(1) if kind == "conv2d" else weight


def from_matrix(kind: str, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_matrix``."""
    if kind in ("conv1d", "embedding"):
        return matrix.t()
    return matrix.view(like.shape) if kind == "conv2d" else matrix


def part_of(place: Place, tensor: Tensor) -> Tensor:
    return tensor if place.part is None else tensor[place.part[0] : place.part[1]]


def with_part(place: Place, whole: Tensor, part: Tensor) -> Tensor:
    if place.part is None:
        return part
    return torch.cat([whole[: place.part[0]], part, whole[place.part[1] :]])


def matrix_of(place: Place, parameter: Tensor) -> Tensor:
    """The matrix [out, in] that a tuner at ``place`` sees, of the parameter that holds it (1-D for norms)."""
    parameter = parameter if place.expert is None else parameter[place.expert]
    return part_of(place, to_matrix(place.kind, parameter.mT if place.turned else parameter))


class Changing:
    """A module's parameters while its tuners change them; the matrices of experts lie apart until the end."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = dict(tensors)
        self.apart: dict[str, list[Tensor]] = {}

    def read(self, name: str, expert: int | None) -> Any:
        if expert is None:
            return self.tensors.get(name)
        if name not in self.apart:
            if self.tensors.get(name) is None:
                return None
            self.apart[name] = list(self.tensors[name].unbind())
        return self.apart[name][expert]

    def write(self, name: str, expert: int | None, value: Tensor) -> None:
        if expert is None:
            self.tensors[name] = value
        else:
            self.apart[name][expert] = value

    def result(self) -> dict[str, Any]:
        return self.tensors | {name: torch.stack(pieces) for name, pieces in self.apart.items()}


def effective(tuners: list[Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The module's parameters with the form 1 and 2 tuners applied, in order."""
    if tuners and all(is_expert_product(tuner) for tuner in tuners):
        return with_products(tuners, tensors)
    changing = Changing(tensors)
    for tuner in tuners:
        if tuner.gives("weight") or tuner.gives("factors"):
            change_weight(tuner, changing)
        if tuner.gives("bias"):
            change_bias(tuner, changing, tensors[tuner.place.parameter])
        if tuner.gives("tensor"):
            for name, tensor in changing.tensors.items():
                if tensor is not None:
                    changing.tensors[name] = tuner.tensor(name, tensor)
    return changing.result()


def change_weight(tuner: Any, changing: Changing) -> None:
    place = tuner.place
    held = changing.read(place.parameter, place.expert)
    whole = to_matrix(place.kind, held.mT if place.turned else held)
    new = with_part(place, whole, tuner.weight(part_of(place, whole)).to(whole.dtype))
    new = from_matrix(place.kind, new, held)
    changing.write(place.parameter, place.expert, new.mT if place.turned else new)


def change_bias(tuner: Any, changing: Changing, weight: Tensor) -> None:
    place = tuner.place
    whole = changing.read(place.bias, place.expert)
    if whole is None and place.part is not None:
        whole = weight.new_zeros(to_matrix(place.kind, weight).shape[0])
    new = tuner.bias(whole if whole is None else part_of(place, whole))
    if new is not None:
        new = new.to(weight.dtype)
        changing.write(place.bias, place.expert, new if whole is None else with_part(place, whole, new))


def is_expert_product(tuner: Any) -> bool:
    """Whether a tuner does nothing but add its product to the matrix of an expert, so that order does not matter."""
    return tuner.place.expert is not None and tuner.form() == 1 and not (tuner.gives("weight") or tuner.gives("bias"))


def with_products(tuners: list[Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The same where every tuner is a product: one batched product for each parameter."""
    changed = dict(tensors)
    for name, (A, B, turned) in expert_factors(tuners, tensors).items():
        change = torch.bmm(B, A).to(changed[name].dtype)  # [experts, out, in]
        changed[name] = changed[name] + (change.mT if turned else change)
    return changed


def expert_factors(tuners: Sequence[Any], tensors: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """A [experts, r, in] and B [experts, out, r] of each parameter, and whether it is stored as [in, out].

    The products of several tuners of one matrix stand side by side; of an expert without a tuner they are zero.
    """
    batches: dict[Hashable, list[tuple[Place, Factors]]] = {}
    met: Counter[Place] = Counter()
    for tuner in tuners:
        place, factors = tuner.place, tuner.factors()
        key = (place.parameter, place.part, factors.A.shape, factors.B.shape, met[place])
        batches.setdefault(key, []).append((place, factors))
        met[place] += 1
    beside: dict[str, list[tuple[Tensor, Tensor]]] = {}
    turned = {tuner.place.parameter: tuner.place.turned for tuner in tuners}
    for members in batches.values():
        place = members[0][0]
        held = tensors[place.parameter]
        A = torch.stack([factors.A for _, factors in members])
        B = torch.stack([factors.B * factors.scale for _, factors in members])
        if place.part is not None:
            start, stop = place.part
            B = F.pad(B, (0, 0, start, held.shape[2 if place.turned else 1] - stop))
        if len(members) < len(held):
            experts = torch.tensor([place.expert for place, _ in members], device=held.device)
            A, B = (side.new_zeros(len(held), *side.shape[1:]).index_copy(0, experts, side) for side in (A, B))
        beside.setdefault(place.parameter, []).append((A, B))
    return {
        name: (torch.cat([A for A, _ in pairs], dim=1), torch.cat([B for _, B in pairs], dim=2), turned[name])
        for name, pairs in beside.items()
    }


def low_rank(module: Any, tuner: Any, x: Tensor) -> Tensor:
    """``scale * B A x`` for one kind of operation, in the dtype of its output."""
    kind, chosen = tuner.place.kind, tuner.selecting()
    if chosen is not None:
        return F.linear(x.index_select(-1, chosen.A), chosen.B.to(x.dtype)) * chosen.scale
    A, B, scale = tuner.factors()
    if kind == "embedding":
        # an embedding is a linear layer on one-hot vectors: A x is a column of A
        dtype = module._parameters["weight"].dtype
        return F.linear(F.embedding(x, A.t().to(dtype)), B.to(dtype)) * scale
    A, B = A.to(x.dtype), B.to(x.dtype)
    if kind == "conv2d":
        kernel = A.view(A.shape[0], module.in_channels, *module.kernel_size)
        inner = module._conv_forward(x, kernel, None)
        return F.conv2d(inner, B[:, :, None, None]) * scale
    return F.linear(F.linear(x, A), B) * scale


def added(place: Place, y: Tensor, change: Tensor) -> Tensor:
    """y with the change in the features of the place (the channels of a convolution are in dimension 1)."""
    if place.part is None:
        return y + change
    start, stop = place.part
    return y + F.pad(change, (start, y.shape[-1] - stop))
