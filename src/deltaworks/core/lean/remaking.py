"""Tensors that need not be kept for the backward pass, because what they were made from is kept anyway.

A norm keeps its input, a gated product its two factors. The linear layers behind them would keep the outputs too; they
keep how these are made, and save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaworks.core.errors import UserError


class Recipe:
    """How one tensor is made again. All who need it in the backward pass get the same one, and the last lets it go."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self.readers = self.waiting = 0
        self.value: Tensor | None = None

    def again(self, parts: tuple[Tensor, ...]) -> Tensor:
        if self.value is None:
            self.value, self.waiting = self.make(*parts), self.readers
        value, self.waiting = self.value, self.waiting - 1
        if self.waiting <= 0:
            self.value = None
        return value


class Origin(NamedTuple):
    """How a tensor was made, of what, at which version, and by whom tensors were saved then (see ``savers``)."""

    recipe: Recipe
    parts: tuple[Tensor, ...]
    version: int
    savers: Any

    def __reduce__(self) -> Any:
        """Copies and files of a tensor do not know how it was made: nothing here can be written."""
        return type(None), ()


def savers() -> Any:
    """The hooks that saved tensors go through now.

    A block that is computed again has its own, and must save the same number of tensors both times: so what was made
    outside of it, where a copy may take its place, is saved inside of it as it is.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def origin_of(x: Tensor) -> Origin | None:
    """How ``x`` was made, if that is known, still so, and what it was made of is saved here."""
    origin: Origin | None = getattr(x, "_origin", None)
    if origin is None or origin.version != x._version or origin.savers != savers():
        return None
    return origin


def made(y: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """``y``, noted as ``make(*parts)``. The parts must be what its maker saves."""
    own = tuple(part.detach() for part in parts)
    y._origin = Origin(Recipe(make), own, y._version, savers())  # type: ignore[attr-defined]
    return y


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, of what tensors are made from where that is known. Nothing is saved for None."""
    parts: list[Tensor] = []
    ctx.recipes = []
    for x in tensors:
        own, recipe = parts_of(x)
        parts += own
        ctx.recipes.append((recipe, len(own)))
    ctx.save_for_backward(*parts)


def taken(ctx: Any) -> list[Any]:
    """The tensors that were given to ``save``. Once for each backward pass."""
    return all_again(ctx.recipes, ctx.saved_tensors)


def parts_of(x: Tensor | None) -> tuple[tuple[Tensor, ...], Recipe | None]:
    """What to keep so that ``x`` can be had in the backward pass, and how it is made of that."""
    if x is None:
        return (), None
    origin = origin_of(x)
    if origin is None:
        return (x.detach(),), None
    origin.recipe.readers += 1
    return origin.parts, origin.recipe


def all_again(recipes: Sequence[tuple[Recipe | None, int]], parts: Sequence[Tensor]) -> list[Any]:
    """Several tensors, of the parts of all of them one after the other."""
    left = iter(parts)
    each = ((recipe, tuple(islice(left, count))) for recipe, count in recipes)
    return [recipe.again(own) if recipe is not None else own[0] if own else None for recipe, own in each]


class Chance:
    """The state of the random numbers at one moment, for what is made again."""

    def __init__(self, *tensors: Tensor) -> None:
        self.devices = list({tensor.device for tensor in tensors if tensor.device.type == "cuda"})
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class Unchanged:
    """What a backward pass computes with again: it must be as it was in the forward pass."""

    def __init__(self, module: Any, *theta: Tensor) -> None:
        home = {} if module is None else module._parameters
        self.module, self.board = module, getattr(module, "_board", None)
        self.held = [(name, x, _version(x)) for name, x in home.items()]
        self.theta = [(x, _version(x)) for x in theta]

    def check(self) -> None:
        """Raises UserError where the module was unwrapped, or its parameters or theta were replaced or written to."""
        same = getattr(self.module, "_board", None) is self.board
        same = same and all(_version(x) == version for x, version in self.theta)
        for name, x, version in self.held:
            same = same and self.module._parameters.get(name) is x and _version(x) == version
        if not same:
            raise UserError(
                "parameters were changed between a forward pass and its backward pass, which computes with them again: "
                "call backward() before optimizer.step(), merge() and detach()"
            )


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


class _Again(torch.autograd.Function):
    """f(x, ..) of which no intermediate result is kept: f is run again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, f: Callable[..., Tensor], module: Any, value: list[Tensor], count: int, *inputs: Tensor
    ) -> Tensor:
        ctx.f, ctx.theta, ctx.arithmetic = f, inputs[count:], arithmetic(value[0].device.type)
        ctx.base = Unchanged(module, *ctx.theta)
        save(ctx, *inputs[:count])
        return value.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.base.check()
        needs = ctx.needs_input_grad[4:]
        inputs = [x.detach() for x in taken(ctx)]
        with torch.enable_grad(), ctx.arithmetic:
            inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=False)]
            y = ctx.f(*inputs)
        wanted = [x for x, need in zip((*inputs, *ctx.theta), needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, gradient, allow_unused=True))
        return None, None, None, None, *[next(found) if need else None for need in needs]


def again(f: Callable[..., Tensor], *inputs: Tensor, module: Any = None) -> Tensor:
    """``f(*inputs)``, of which neither the intermediate results nor the output are kept; f may run a ``module``."""
    if not acts():
        return f(*inputs)
    alone = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    chance = Chance(*inputs)
    with structure():
        y = f(*alone)
    if not y.requires_grad:
        return y

    def replayed(*inputs: Tensor) -> Tensor:
        with chance.again():
            return f(*inputs)

    theta = [leaf for leaf in leaves(y) if not any(leaf is x for x in alone)]
    return noted(_Again.apply(replayed, module, [y.detach()], len(inputs), *inputs, *theta), replayed, inputs)


def noted(y: Tensor, f: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """``y``, noted as f of inputs that may themselves be made again."""
    found = [parts_of(x) for x in inputs]
    recipes = [(recipe, len(parts)) for parts, recipe in found]

    def make(*parts: Tensor) -> Tensor:
        return f(*all_again(recipes, parts))

    return made(y, as_now(make, y), *(part for parts, _ in found for part in parts))


def structure() -> Any:
    """A context whose graphs know what was computed of what, and keep nothing to compute gradients with."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    """What autograd would give gradients to, of tensors that were just computed."""
    found: dict[int, Tensor] = {id(t): t for t in tensors if t is not None and t.is_leaf and t.requires_grad}
    nodes = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes.append(node)
            if hasattr(node, "variable"):
                found[id(node.variable)] = node.variable
    return list(found.values())


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, of which it is known how it was made where it is known of ``x``."""
    y, origin = x.to(dtype), origin_of(x)
    if y is x or origin is None:
        return y
    make = origin.recipe.make
    return made(y, lambda *parts: make(*parts).to(dtype), *origin.parts)


def autocasts(device: str) -> bool:
    """Whether autocast acts on a kind of device; on some, such as meta, it never does."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def arithmetic(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast is what it is now: a backward pass runs outside of it."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled=enabled)


def as_now(run: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """``run``, with autocast as it is now for the device of ``x``."""
    if not autocasts(x.device.type):
        return run
    context = arithmetic(x.device.type)

    def again(*args: Tensor) -> Tensor:
        with context:
            return run(*args)

    return again


_on = True


def acts(always: bool = False) -> bool:
    """Whether lean pieces act now: where gradients are recorded, or ``always``.

    A compiler recomputes by its own reckoning, and function transforms differentiate by theirs.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return _on and (always or torch.is_grad_enabled())


@contextmanager
def ordinary() -> Iterator[None]:
    """Torch's own autograd for a while, to compare with."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before
