"""A run without values: what its tensors weigh, how long they live and what its operations cost.

Models and batches are on the meta device, so that every operation runs as it would and computes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from deltaworks.advise.values import RULES

aten = torch.ops.aten
SMALL = 4096  # entries of a tensor whose values are kept when it moves to the meta device


class Phantom(TorchDispatchMode):
    """Counts bytes that live and operations that run.

    ``now`` and ``peak`` are bytes of the storages that were made inside, with the scratch memory of kernels;
    ``operations`` holds (floating-point operations, bytes read and written) of each operation that moves data.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.scratch = SCRATCH if device == "cpu" else {}
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
        if func.overloadpacket is aten._to_copy and result.is_meta and not on_meta and args[0].numel() <= SMALL:
            self.learn(result, args[0])
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        made = [leaf for leaf in outputs if _address(leaf) not in read]
        for leaf in made:
            self._note(leaf.untyped_storage())
        if on_meta or any(leaf.is_meta for leaf in made):
            need = self.scratch.get(func.overloadpacket)
            self.peak = max(self.peak, self.now + (need(*args) if need is not None else 0))
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


def _of_topk(values: Tensor, count: int, dim: int = -1, *_: Any) -> int:
    return 16 * (values.shape[dim] if values.dim() else 1)  # pairs of value and position, of one slice


SCRATCH: dict[Any, Callable[..., int]] = {aten.topk: _of_topk}
"""Bytes that kernels of the CPU hold beside their outputs while they run."""
