"""How operations run with their tuners: effective weights inside, low-rank products beside, wrappers around.

A runner gets the module, its own forward (``run``), the tuners that act and the arguments of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core import experts
from deltaworks.core.lean import linear
from deltaworks.core.lean.remaking import acts, again
from deltaworks.core.places import LINEAR
from deltaworks.core.quantized import is_quantized
from deltaworks.core.trunks import run_trunk
from deltaworks.core.weights import WEIGHT_KINDS, added, base_tensors, effective, low_rank


class Operation:
    """``base`` for tuners around a module whose first argument is a tensor and whose output holds one first.

    A table that is asked for without an argument, such as Swin's position bias, has None for it.
    """

    def __init__(self, module: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.run, self.rest, self.kwargs = run, args[1:], kwargs
        self.output: Any = None
        self.count = len(args) + len(kwargs)
        self.keyword = "" if args else next(iter(kwargs), "")
        self.x: Any = args[0] if args else kwargs.get(self.keyword)

    def __call__(self, x: Any) -> Tensor:
        if not self.count:
            self.output = self.run()
        elif self.keyword:
            self.output = self.run(**{**self.kwargs, self.keyword: x})
        else:
            self.output = self.run(x, *self.rest, **self.kwargs)
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def replaced(self, y: Tensor) -> Any:
        """The output with its tensor replaced."""
        return (y, *self.output[1:]) if isinstance(self.output, tuple) else y


def run_weights(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A module with weight: effective weights inside, low-rank products added, operations around, in order."""
    operation = Operation(module, run, args, kwargs)
    inside = within(module, tuners)
    beside = [tuner for tuner in tuners if tuner not in inside]
    base: Callable[[Any], Tensor] = operation
    if inside:
        base = functools.partial(run_inside, module, inside, operation)
    elif beside[0].place.kind in LINEAR and acts(_drops(module, beside)) and linear.is_linear(module):
        first = list(takewhile(lambda tuner: tuner.form() == 1 and not tuner.gives("around"), beside))
        if first:
            base = functools.partial(linear.products, module, operation, first)
            beside = beside[len(first) :]
    for tuner in beside:
        base = functools.partial(run_beside, module, tuner, base)
    return operation.replaced(base(operation.x))


def _drops(module: Any, tuners: list[Any]) -> bool:
    """Whether dropout acts: its masks are drawn in one way, since a block may be computed again with gradients."""
    return module.training and any(tuner.dropout for tuner in tuners)


def within(module: Any, tuners: list[Any]) -> list[Any]:
    """The tuners that act through the effective weight."""
    found = [tuner for tuner in tuners if acts_inside(module, tuner)]
    if late := [tuner for tuner in found if tuner.gives("tensor") or not tuner.adds]:
        # what replaces the weight that it finds must find it with the changes that come before
        before = tuners[: tuners.index(late[-1])]
        found = [tuner for tuner in tuners if tuner in found or (tuner in before and tuner.form() < 3)]
    return found


def run_inside(module: Any, tuners: list[Any], operation: Operation, x: Any) -> Tensor:
    """The operation with the effective weight of these tuners in the place of its own."""
    kind, lean = tuners[0].place.kind, acts()
    if kind in LINEAR and linear.is_linear(module) and (lean or is_quantized(module)):
        return (linear.weighted if lean else linear.multiplied)(module, tuners, x)
    if experts.can_run(module, tuners, (x, *operation.rest), operation.kwargs):
        return experts.run(module, tuners, x, *operation.rest)

    def shown(x: Any) -> Tensor:
        module._effective = effective(tuners, base_tensors(module))
        try:
            return operation(x)
        finally:
            module._effective = None

    # of norms and embeddings neither the weight nor what the operation makes of it is kept
    remade = kind in ("norm", "embedding") and operation.count == 1
    return again(shown, x, module=module) if remade else shown(x)


def acts_inside(module: Any, tuner: Any) -> bool:
    """Whether a tuner acts through the effective weight, rather than beside or around the operation."""
    if tuner.place.kind == "matrix":
        return True
    return not has_product(module, tuner) if tuner.form() == 1 else tuner.form() == 2 and not tuner.gives("around")


def has_product(module: Any, tuner: Any) -> bool:
    """Whether form 1 runs as a product beside the operation, rather than through the effective weight."""
    kind = tuner.place.kind
    if kind == "embedding":  # not where a subclass looks up something else than its input
        return module._plain_class.forward is nn.Embedding.forward
    return kind in ("linear", "conv1d") or (kind == "conv2d" and module.groups == 1)


def run_beside(module: nn.Module, tuner: Any, base: Callable[[Any], Tensor], x: Any) -> Tensor:
    """One tuner of form 1 or 3 around ``base``."""
    place = tuner.place
    if tuner.gives("around"):
        if place.part is None:
            return tuner.around(base, x)
        start, stop = place.part
        y = base(x)

        def part(new: Any) -> Tensor:
            return (y if new is x else base(new))[..., start:stop]

        return torch.cat([y[..., :start], tuner.around(part, x), y[..., stop:]], dim=-1)
    y = base(x)
    dropped = F.dropout(x, tuner.dropout, module.training) if tuner.dropout and x.is_floating_point() else x
    return added(place, y, low_rank(module, tuner, dropped).to(y.dtype))


def run_around(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A residual sub-layer or a block. Where the input is read by another module, that module's tap holds it."""
    operation = Operation(module, run, args, kwargs)
    base: Callable[[Any], Tensor] = operation
    x = operation.x
    tap = module.__dict__.get("_entry_tap")
    if tap is not None:
        inside, x = operation.x, tap.value

        def fixed(_: Any) -> Tensor:
            return operation(inside)

        base = fixed
    for tuner in tuners:
        base = functools.partial(tuner.around, base)
    return operation.replaced(base(x))


def run_heads(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """An attention module: its attention function is ours for the time of the call."""
    module._attending = (tuners, args[0] if args else kwargs["hidden_states"])
    try:
        return run(*args, **kwargs)
    finally:
        module._attending = None


RUNNERS: tuple[tuple[tuple[str, ...], Callable[..., Any]], ...] = (
    (("keyvalue",), run_heads),
    (WEIGHT_KINDS, run_weights),
    (("sublayer", "block"), run_around),
    (("trunk",), run_trunk),
)
