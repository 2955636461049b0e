"""Weights as the matrices that tuners see, and the effective parameters of a module with its tuners."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.forms import Factors
from deltaworks.core.places import Place
from deltaworks.core.quantized import dense_weight, is_quantized

WEIGHT_KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm", "parameters")


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


def effective(tuners: list[Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The module's parameters with the form 1 and 2 tuners applied, in order."""
    changed = dict(tensors)
    for tuner in tuners:
        place = tuner.place
        if tuner.gives("weight") or tuner.gives("factors"):
            whole = to_matrix(place.kind, changed["weight"])
            new = tuner.weight(part_of(place, whole)).to(whole.dtype)
            changed["weight"] = from_matrix(place.kind, with_part(place, whole, new), tensors["weight"])
        if tuner.gives("bias"):
            bias = changed.get("bias")
            if bias is None and place.part is not None:
                bias = torch.zeros_like(changed["weight"][0])
            new = tuner.bias(bias if bias is None else part_of(place, bias))
            if new is not None:
                new = new.to(tensors["weight"].dtype)
                changed["bias"] = new if bias is None else with_part(place, bias, new)
        if tuner.gives("tensor"):
            for name, tensor in changed.items():
                if tensor is not None:
                    changed[name] = tuner.tensor(name, tensor)
    return changed


def low_rank(module: Any, place: Place, factors: Factors, x: Tensor) -> Tensor:
    """``scale * B A x`` for one kind of operation, in the dtype of its output."""
    A, B, scale = factors
    if place.kind == "embedding":
        # an embedding is a linear layer on one-hot vectors: A x is a column of A
        dtype = module._parameters["weight"].dtype
        return F.linear(F.embedding(x, A.t().to(dtype)), B.to(dtype)) * scale
    A, B = A.to(x.dtype), B.to(x.dtype)
    if place.kind == "conv2d":
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
