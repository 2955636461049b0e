"""Norms, activations and gated products that keep their inputs alone and say how their outputs are made again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaworks.core.lean import fused
from deltaworks.core.lean.remaking import Unchanged, acts, as_now, made
from deltaworks.core.places import is_norm

ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
"""The modules whose classes are functions of each entry alone, but for those that are not."""
NOT_ENTRYWISE = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU, nn.MultiheadAttention, nn.RReLU)


def lean_forward(module: Any) -> Callable[..., Any] | None:
    """What runs a frozen neighbour of linear layers, or None for a module of which no lean form is known.

    It takes the module's own forward and the arguments of the call.
    """
    if next(module.children(), None) is not None:
        return None
    if type(module).forward is nn.LayerNorm.forward:
        return functools.partial(_run_layer_norm, module)
    if is_norm(module) and (gain := rms_gain(module)) is not None:
        return functools.partial(_run_rms_norm, module, gain)
    if is_activation(module):
        return functools.partial(_run_activation, module)
    return None


def gate_forward(module: nn.Module) -> Callable[..., Any]:
    """The same for an activation whose output will be multiplied with that of another linear layer (up)."""
    return functools.partial(_run_gate, module, fused.gate_of(module))


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a fixed function of each entry."""
    known = type(module).__module__ in ACTIVATIONS and not isinstance(module, NOT_ENTRYWISE)
    return known and not getattr(module, "inplace", False) and next(module.parameters(), None) is None


def _applies(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of a frozen module on one tensor through which a gradient goes."""
    if not acts() or len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].requires_grad:
        return False
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _run_layer_norm(module: nn.LayerNorm, run: Any, *args: Any, **kwargs: Any) -> Any:
    x: Any = args[0] if args else None
    if not _applies(module, args, kwargs) or module.weight is None or x.dtype != module.weight.dtype:
        return run(*args, **kwargs)
    return made(run(x), as_now(run, x), x)  # torch's own keeps the input and the row statistics


class _RMSNorm(torch.autograd.Function):
    r"""y = w * x / rms(x) over the last dimension, rms(x)^2 = mean(x^2) + eps; kept are x and r = 1 / rms(x).

    With g the gradient of y and h = w * g: dx = r h - r^3 x mean(h x). In float32, as the norms compute.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, gain: float, run: Any) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square() / x.shape[-1]
        ctx.save_for_backward(x, (square + _eps(module)).rsqrt())
        ctx.module, ctx.gain, ctx.base = module, gain, Unchanged(module)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.base.check()
        x, r = ctx.saved_tensors
        weight = ctx.module.weight.to(r.dtype) + ctx.gain
        h = gradient * weight  # [..., width], in the wide dtype
        mean = (h * x).mean(dim=-1, keepdim=True)
        dx = h.mul_(r).addcmul_(x.to(r.dtype), mean * r**3, value=-1)
        return dx.to(x.dtype), None, None, None


def _run_rms_norm(module: Any, gain: float, run: Any, *args: Any, **kwargs: Any) -> Any:
    if not _applies(module, args, kwargs):
        return run(*args, **kwargs)
    x = args[0]
    if (kernel := fused.rms_norm(x, module.weight, _eps(module), gain)) is not None:
        return made(kernel(x), kernel, x)
    return made(_RMSNorm.apply(x, module, gain, run), as_now(run, x), x)


def _eps(module: Any) -> float:
    return float(next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)))


@torch.no_grad()
def rms_gain(module: Any) -> float | None:
    """What a norm by the root mean square adds to its weight: 0, or 1 (Gemma). None for every other norm.

    Told by the outputs of a copy with known values, since the classes of families differ in name alone; once for all
    norms of a class and width that have the same flags.
    """
    weight = module._parameters.get("weight")
    eps = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or not any(isinstance(e, float) for e in eps):
        return None
    flags = tuple((name, x) for name, x in vars(module).items() if isinstance(x, (str, int, float)))
    return _gain_of(type(module), weight.shape[0], flags, _Probe(module))  # type: ignore[arg-type]


class _Probe:
    """A module as an argument that a cache does not look at."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probe)


@functools.cache
def _gain_of(kind: type[nn.Module], width: int, flags: tuple[tuple[str, Any], ...], probe: _Probe) -> float | None:
    twin: Any = copy.deepcopy(probe.module).to_empty(device="cpu").double()
    with torch.device("cpu"):  # models are built on the meta device too
        generator = torch.Generator().manual_seed(0)
        twin.weight.copy_(torch.rand(width, generator=generator, dtype=torch.float64) + 0.5)
        x = torch.randn(2, width, generator=generator, dtype=torch.float64)
    y = twin(x)
    scaled = x * (x.square().mean(-1, keepdim=True) + _eps(twin)).rsqrt()
    return next((gain for gain in (0.0, 1.0) if torch.allclose(y, scaled * (twin.weight + gain), rtol=1e-5)), None)


class _Activation(torch.autograd.Function):
    """y = f(x) for each entry; only x is kept, and f is run again for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, y = _with_graph(ctx.run, *ctx.saved_tensors)
        return torch.autograd.grad(y, x, gradient)[0], None


def _activated(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return made(_Activation.apply(x, run), run, x)


def _with_graph(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a leaf, and f(x) with what its derivative needs."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return x, run(x)


class _Opened:
    """f(gate) * up, and its gradients, which have f(gate) in common.

    What the product is made again with waits for the gradients, since these are the next to be computed.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run
        self.waiting: tuple[Tensor, Tensor] | None = None

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.run(gate) * up

    def again(self, gate: Tensor, up: Tensor) -> Tensor:
        self.waiting = _with_graph(self.run, gate)
        return self.waiting[1].detach() * up

    def gradients(self, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (gate, open), self.waiting = self.waiting or _with_graph(self.run, gate), None
        return torch.autograd.grad(open, gate, gradient * up)[0], gradient * open.detach()


class _Gated(torch.autograd.Function):
    """y = f(gate) * up for each entry; only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, opened: _Opened | fused.Gated) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.opened = opened
        return opened.product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return *ctx.opened.gradients(*ctx.saved_tensors, gradient), None


class Activated(Tensor):
    """The output of an activation that is not computed yet: a product with another tensor will be one operation.

    It stands on its input, whose shape and dtype are its own.
    """

    input: Tensor
    run: Callable[[Tensor], Tensor]
    gate: str | None

    @staticmethod
    def of(x: Tensor, run: Callable[[Tensor], Tensor], gate: str | None = None) -> Activated:
        y = x.detach().as_subclass(Activated)
        y.input, y.run, y.gate = x, run, gate
        return y

    @functools.cached_property
    def value(self) -> Tensor:
        with torch.enable_grad():  # whoever asks first may need no gradient
            return _activated(self.run, self.input)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            gate, up = args if isinstance(args[0], Activated) else args[::-1]
            if type(up) is Tensor and (up.shape, up.dtype) == (gate.input.shape, gate.input.dtype):
                return gate.times(up)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*computed(args), **computed(kwargs or {}))

    def times(self, up: Tensor) -> Tensor:
        opened = fused.gated(self.gate, self.input) or _Opened(self.run)
        return made(_Gated.apply(self.input, up, opened), opened.again, self.input, up)


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SHAPES = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
)


def computed(tree: Any) -> Any:
    """Arguments with computed activations in the place of those that wait. Outputs of models stay what they are."""
    if isinstance(tree, Activated):
        return tree.value
    if type(tree) in (tuple, list):
        return type(tree)(map(computed, tree))
    return {key: computed(value) for key, value in tree.items()} if type(tree) is dict else tree


def _run_activation(module: nn.Module, run: Any, *args: Any, **kwargs: Any) -> Any:
    return _activated(as_now(run, args[0]), args[0]) if _applies(module, args, kwargs) else run(*args, **kwargs)


def _run_gate(module: nn.Module, gate: str | None, run: Any, *args: Any, **kwargs: Any) -> Any:
    watched = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if watched or not _applies(module, args, kwargs):
        return _run_activation(module, run, *args, **kwargs)
    return Activated.of(args[0], as_now(run, args[0]), gate)
