"""A training step without values: what its tensors weigh, how long they live and what its operations cost.

Models and batches are on the meta device, so that every operation runs as it would and computes nothing. Two modes
stand around it: ``Kernels`` lets operations take the kernels of the device that is meant, which save other tensors
than those of the meta device; ``Phantom`` counts, and answers what only values could tell: what is chosen by values is
spread evenly, and a condition holds.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from deltaworks.core.errors import UserError

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


class Phantom(TorchDispatchMode):
    """Counts bytes that live and operations that run.

    ``now`` and ``peak`` are bytes of the storages that were made inside, with the scratch memory of kernels;
    ``operations`` holds (floating-point operations, bytes read and written) of each operation that moves data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[weakref.ref[Any], int] = {}
        self.now = self.peak = self.asked = 0
        self.operations: list[tuple[int, int]] = []
        self.known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # facts, by storage

    def hold(self, tensor: Tensor) -> None:
        """Count what was made outside, while it lives."""
        self._note(tensor.untyped_storage())

    def turn(self) -> int:
        """The peak so far; the next one is measured anew."""
        peak, self.peak = self.peak, self.now
        return peak

    def fact(self, tensor: Any) -> Any:
        """What is known of the values: a Tensor that holds them, a ``Chosen``, an int (the rank of a threshold)."""
        return self.known.get(tensor.untyped_storage()) if isinstance(tensor, Tensor) else None

    def learn(self, tensor: Tensor, fact: Any) -> Tensor:
        if fact is not None:
            self.known[tensor.untyped_storage()] = fact
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = {_address(leaf) for leaf in inputs}
        rule = RULES.get(func.overloadpacket)
        on_meta = any(leaf.is_meta for leaf in inputs)
        result = rule(self, func, *args, **kwargs) if rule is not None and on_meta else func(*args, **kwargs)
        if func.overloadpacket is aten._to_copy and result.is_meta and not on_meta:
            self.learn(result, args[0])
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        made = [leaf for leaf in outputs if _address(leaf) not in read]
        for leaf in made:
            self._note(leaf.untyped_storage())
        if on_meta or any(leaf.is_meta for leaf in made):
            self.peak = max(self.peak, self.now + scratch(func, args))
            if made or func._schema.is_mutable:
                self.operations.append((flops(func, args, kwargs, result), sum(map(_bytes, [*inputs, *made]))))
        return result

    def _note(self, storage: Any) -> None:
        reference = weakref.ref(storage, self._gone)
        if reference not in self.live:
            self.live[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _gone(self, reference: weakref.ref[Any]) -> None:
        self.now -= self.live.pop(reference, 0)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations as torch.utils.flop_counter counts them: matrix products, convolutions, attention."""
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


# ---------------------------------------------------------------------- what kernels need beside their outputs


def scratch(func: Any, args: Any) -> int:
    """Bytes that the kernel of an operation on the CPU holds while it runs."""
    need = SCRATCH.get(func.overloadpacket)
    return need(*args) if need is not None else 0


def _of_topk(values: Tensor, count: int, dim: int = -1, *_: Any) -> int:
    return 16 * (values.shape[dim] if values.dim() else 1)  # pairs of value and position, of one slice


SCRATCH: dict[Any, Callable[..., int]] = {aten.topk: _of_topk}

# ---------------------------------------------------------------------- what only values could tell


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
    return fact.within(mask.storage_offset(), mask.storage_offset() + mask.numel())


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

# ---------------------------------------------------------------------- the kernels of the device that is meant


class Kernels(TorchFunctionMode):
    """Lets operations on meta tensors save what they save on a device: "cpu" or "cuda"."""

    def __init__(self, device: str, phantom: Phantom, ungraded: Collection[Tensor] = ()) -> None:
        super().__init__()
        self.cuda, self.phantom = device == "cuda", phantom
        self.ungraded = {id(tensor) for tensor in ungraded}  # what is quantized has no gradient

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self.attention(*args, **kwargs)
        if func is F.dropout and self.cuda and args[0].is_meta:
            return self.dropout(*args, **kwargs)
        if func is Tensor.backward:  # torch leaves the mode for it, but blocks that are computed again need it
            with self:
                seed = torch.ones_like(args[0]) if kwargs.get("gradient") is None else kwargs["gradient"]
                keep, again = kwargs.get("retain_graph"), bool(kwargs.get("create_graph"))
                keep = again if keep is None else keep
                inputs = tuple(kwargs.get("inputs") or ())
                return _engine_run_backward(
                    args, (seed,), keep, again, inputs, allow_unreachable=True, accumulate_grad=True
                )
        if func is Tensor.requires_grad_ and id(args[0]) in self.ungraded and (args[1:] or (True,))[0]:
            raise UserError("the method needs gradients of the base weights, and quantized ones have none")
        result = func(*args, **kwargs)
        if func is torch.tensor and result.is_meta:
            self.phantom.learn(result, torch.tensor(args[0], dtype=kwargs.get("dtype")))
        return result

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and 0 < p < 1 else x

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The fused kernel where the device has one for these arguments, else the plain products."""
        if self.cuda:
            return self.attention_of_cuda(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        tensors = [_small(each) for each in (query, key, value)]
        mask = None if attn_mask is None else _small(attn_mask[..., :1])
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        with torch.enable_grad():  # asked of torch itself, with real tensors of one token
            choice = torch._fused_sdp_choice(*tensors, mask, dropout_p, **options)  # type: ignore[attr-defined]
        if choice == torch.nn.attention.SDPBackend.MATH.value:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)  # type: ignore[arg-type]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, -math.inf)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def attention_of_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
        scale: float | None, grouped: bool,
    ) -> Tensor:  # fmt: skip
        if mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, False, scale=scale)[0]
        if grouped:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        if mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            mask = (
                torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0) if mask.dtype == torch.bool else mask
            )
            mask = mask.expand(shape)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, torch.is_grad_enabled(), dropout, causal, scale=scale
        )[0]


def _small(tensor: Tensor) -> Tensor:
    """A real tensor with the heads and features of one on meta, and one row and token."""
    shape = [1 if dim in (0, tensor.dim() - 2) else size for dim, size in enumerate(tensor.shape)]
    return torch.zeros(shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
