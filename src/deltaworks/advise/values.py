"""What only values could tell, answered without them: what is chosen is spread evenly, and a condition holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deltaworks.advise.phantom import Phantom

aten = torch.ops.aten
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Normal:
    """The values are N(0, std^2): 0 for zeros, infinity for what is far from zero."""

    std: float

    def below(self, bound: float) -> float:
        """The share of the absolute values that is less than ``bound``."""
        return math.erf(bound / (self.std * math.sqrt(2))) if self.std else 1.0


@dataclass(frozen=True)
class Chosen:
    """Of the ``size`` entries of a storage ``count`` are not zero, spread evenly."""

    count: int
    size: int

    def within(self, start: int, stop: int) -> int:
        """How many lie in a range of entries; over ranges that tile the storage they sum up to ``count``."""
        return stop * self.count // self.size - start * self.count // self.size


def spread(count: int) -> Tensor:
    """Different numbers in (0, 1), of which any first few, and any others in a row, are spread evenly."""
    return torch.arange(1, count + 1, dtype=torch.float64).mul(GOLDEN).frac()


def _number(phantom: Phantom, func: Any, tensor: Tensor) -> Any:
    fact = phantom.fact(tensor)
    if isinstance(fact, Tensor):
        return fact.item()
    if not tensor.is_floating_point():
        return True if tensor.dtype == torch.bool else 1
    phantom.asked += 1
    return phantom.asked * GOLDEN % 1


def _count(phantom: Phantom, mask: Tensor) -> int:
    """How many entries are not zero: all, where nothing is known."""
    fact = phantom.fact(mask)
    if not isinstance(fact, Chosen):
        return mask.numel()
    start = int(mask.storage_offset())
    return fact.within(start, start + mask.numel())


def _nonzero(phantom: Phantom, func: Any, mask: Tensor) -> Tensor:
    return torch.empty(_count(phantom, mask), mask.dim(), dtype=torch.long, device="meta")


def _index(phantom: Phantom, func: Any, tensor: Tensor, indices: Any) -> Tensor:
    plain: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            positions = torch.empty(_count(phantom, index), dtype=torch.long, device="meta")
            plain += [positions] * index.dim()
        else:
            plain.append(index)
    return func(tensor, plain)


def _masked_select(phantom: Phantom, func: Any, tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_empty(_count(phantom, mask))


def _to_copy(phantom: Phantom, func: Any, tensor: Tensor, **options: Any) -> Tensor:
    device = options.get("device")
    if device is None or torch.device(device).type == "meta":
        return phantom.learn(func(tensor, **options), phantom.fact(tensor))
    dtype, fact = options.get("dtype") or tensor.dtype, phantom.fact(tensor)
    if isinstance(fact, Tensor) and fact.shape == tensor.shape:
        return fact.to(dtype, copy=True)
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=dtype)
    if isinstance(fact, range):  # positions in a tensor
        return (spread(tensor.numel()) * len(fact)).to(dtype).view(tensor.shape)
    return spread(tensor.numel()).view(tensor.shape).to(dtype)


def _topk(phantom: Phantom, func: Any, tensor: Tensor, count: int, *rest: Any, **options: Any) -> Any:
    values, positions = func(tensor, count, *rest, **options)
    phantom.learn(values, count)
    return values, phantom.learn(positions, range(tensor.shape[-1] if tensor.dim() else 1))


def _least(phantom: Phantom, func: Any, tensor: Tensor, *rest: Any, **options: Any) -> Any:
    result, fact = func(tensor, *rest, **options), phantom.fact(tensor)
    return phantom.learn(result, fact) if isinstance(fact, int) and isinstance(result, Tensor) else result


def _above(phantom: Phantom, func: Any, tensor: Tensor, other: Any, *rest: Any) -> Tensor:
    result, fact = func(tensor, other, *rest), phantom.fact(other)
    return phantom.learn(result, Chosen(fact, result.numel())) if isinstance(fact, int) else result


def _equals(phantom: Phantom, func: Any, tensor: Tensor, other: Any, *rest: Any) -> Tensor:
    result, fact = func(tensor, other, *rest), phantom.fact(other)
    return phantom.learn(result, Chosen(0, result.numel())) if isinstance(fact, int) else result


def _below(phantom: Phantom, func: Any, tensor: Tensor, bound: Any, *rest: Any) -> Tensor:
    result, fact = func(tensor, bound, *rest), phantom.fact(tensor)
    if not isinstance(fact, Normal) or isinstance(bound, Tensor):
        return result
    return phantom.learn(result, Chosen(round(fact.below(bound) * result.numel()), result.numel()))


def _as_before(phantom: Phantom, func: Any, tensor: Tensor, *rest: Any) -> Tensor:
    return phantom.learn(func(tensor, *rest), phantom.fact(tensor))


def _times(phantom: Phantom, func: Any, tensor: Tensor, other: Any, *rest: Any) -> Tensor:
    """What is zero stays zero."""
    facts = [phantom.fact(each) for each in (tensor, other) if isinstance(each, Tensor)]
    counts = [_count(phantom, each) for each in (tensor, other) if isinstance(phantom.fact(each), Chosen)]
    counts += [int(fact.count_nonzero()) for fact in facts if isinstance(fact, Tensor) and fact.dim()]
    result = func(tensor, other, *rest)
    return phantom.learn(result, Chosen(min(counts), max(1, result.numel()))) if counts else result


def _copy(phantom: Phantom, func: Any, tensor: Tensor, other: Tensor, *rest: Any) -> Tensor:
    fact = phantom.fact(other)
    result = func(tensor, other, *rest)
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return phantom.learn(result, fact) if isinstance(fact, Chosen) and whole else result


def _index_fill(phantom: Phantom, func: Any, tensor: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    result = func(tensor, dim, index, value)
    return phantom.learn(result, Chosen(index.numel(), result.numel())) if result.dim() == 1 else result


def _searchsorted(phantom: Phantom, func: Any, ordered: Tensor, values: Any, **options: Any) -> Tensor:
    result, ends = func(ordered, values, **options), phantom.fact(values)
    if isinstance(ends, Tensor) and ends.numel():
        phantom.learn(result, ends * ordered.numel() // max(1, int(ends.max())))
    return result


def _equal(phantom: Phantom, func: Any, tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape


def _count_nonzero(phantom: Phantom, func: Any, tensor: Tensor, *rest: Any) -> Tensor:
    result = func(tensor, *rest)
    return phantom.learn(result, torch.tensor(_count(phantom, tensor))) if not result.dim() else result


RULES: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _number,
    aten.nonzero: _nonzero,
    aten.index: _index,
    aten.masked_select: _masked_select,
    aten._to_copy: _to_copy,
    aten.topk: _topk,
    aten.min: _least,
    aten.gt: _above,
    aten.eq: _equals,
    aten.index_fill: _index_fill,
    aten.lt: _below,
    aten.abs: _as_before,
    aten.ne: _as_before,
    aten.mul: _times,
    aten.mul_: _times,
    aten.copy_: _copy,
    aten.searchsorted: _searchsorted,
    aten.equal: _equal,
    aten.count_nonzero: _count_nonzero,
}
