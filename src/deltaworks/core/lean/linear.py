"""Linear layers with tuners, for which the input alone is kept: ranks, masks and weights are made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaworks.core.forms import Factors
from deltaworks.core.lean.remaking import (
    Chance,
    Unchanged,
    acts,
    again,
    arithmetic,
    autocasts,
    cast,
    leaves,
    origin_of,
    save,
    structure,
    taken,
)
from deltaworks.core.places import features_of
from deltaworks.core.quantized import compute_dtype, is_quantized
from deltaworks.core.weights import base_tensors, effective, to_matrix

SMALL = 16
"""A product x A^T is kept where x has at least so many times more features."""


class Low(NamedTuple):
    """One product ``scale * dropout(x) A^T B^T`` in the output features [start, stop); a mask is its seed.

    ``columns`` [r] are those that A selects, where it does only that: there is no tensor A then.
    """

    start: int
    stop: int
    scale: float
    dropout: float
    seed: int
    columns: Tensor | None = None

    def kept(self, x: Tensor) -> Tensor | None:
        """Which entries dropout keeps: the same ones in both passes. Each of them has 16 random bits."""
        if not self.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)
        return bits[: x.numel()].view(x.shape) >= round(2**16 * (self.dropout - 0.5))

    def inner(self, x: Tensor, A: Tensor) -> Tensor:
        """dropout(x) A^T [tokens, r] of x [tokens, in]."""
        if self.columns is not None:
            return x.index_select(1, self.columns)
        return self.dropped(x, self.kept(x)) @ A.to(x.dtype).T

    def is_small(self, inner: Tensor, x: Tensor) -> bool:
        """Whether x A^T is kept in any case."""
        return self.columns is not None or SMALL * inner.shape[-1] <= x.shape[-1]

    def dropped(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """x with the other entries zero, and those that are kept larger."""
        return x if kept is None else torch.where(kept, x / (1 - self.dropout), 0)

    def gradients(
        self,
        g: Tensor,
        x: Tensor | None,
        dx: Tensor | None,
        A: Any,
        B: Tensor,
        inner: Any,
        of_A: bool,
        of_B: bool,
        mask: Tensor | None = None,
    ) -> list[Tensor | None]:
        """dA = s (g B)^T x' and dB = s g^T (x' A^T) with x' = dropout(x); s (g B) A, masked like x', is added to dx.

        ``inner`` is x' A^T, and ``mask`` that of the dropout, where they are known. Nothing is computed that is not
        needed: x is None where that is so of x'.
        """
        part = g[:, self.start : self.stop]
        back = part @ B.to(g.dtype)
        a: Any = None if A is None else A.to(g.dtype)
        seen: Any = None
        dA = dB = None
        if x is not None and (of_A or (of_B and inner is None)):
            mask = self.kept(x) if mask is None else mask
            seen = self.dropped(x, mask)
        if dx is not None:
            if self.columns is not None:
                dx.index_add_(1, self.columns, back, alpha=self.scale)
            elif self.dropout:
                dx.add_(self.dropped(back @ a, self.kept(dx) if mask is None else mask), alpha=self.scale)
            else:
                dx.addmm_(back, a, alpha=self.scale)
        if of_B:
            inner = seen @ a.T if inner is None else inner
            dB = (self.scale * (part.T @ inner)).to(B.dtype)
        if of_A:
            dA = (self.scale * (back.T @ seen)).to(A.dtype)
        return [dA, dB]


def is_linear(module: Any) -> bool:
    """Whether a wrapped module computes ``x W^T + b`` with frozen weights that lie where x does, and nothing else."""
    if is_quantized(module):
        return True
    if module._own_forward is not None or any(p is not None and p.requires_grad for p in module._parameters.values()):
        return False
    plain = module._plain_class
    return plain.forward is nn.Linear.forward or plain.__name__ == "Conv1D"


def matrix(module: Any) -> Tensor:
    """The frozen weight [out, in] of a linear layer, of which the codes may be all that is kept."""
    weight: Tensor = base_tensors(module)["weight"]
    return weight if is_quantized(module) else to_matrix(_kind(module), weight)


def _kind(module: Any) -> str:
    return "conv1d" if module._plain_class.__name__ == "Conv1D" else "linear"


class _Products(torch.autograd.Function):
    r"""A frozen linear layer with low-rank products beside it: y = x W^T + b + sum_i s_i x_i A_i^T B_i^T.

    With g the gradient of y and x_i = x under the i-th dropout mask: dx = g W + sum of the products' parts, for which,
    and for dA and dB, see ``Low.gradients``. Kept are x, the factors, and x_i A_i^T where that is small beside x.
    Shapes: x [tokens, in], g [tokens, out], A [r, in], B [out, r].
    """

    @staticmethod
    def forward(ctx: Any, module: Any, run: Any, lows: Sequence[Low], x: Tensor, *factors: Tensor) -> Tensor:
        y = run(x)
        inners = add_products(y, x, lows, factors)
        ctx.module, ctx.lows, ctx.base, needs = module, lows, Unchanged(module), ctx.needs_input_grad[4:]
        of_A, of_B = any(needs[::2]), any(needs[1::2])
        small = [low.is_small(inner, x) for low, inner in zip(lows, inners, strict=True)]
        of_x = of_A or (of_B and not all(small) and origin_of(x) is not None)  # for dB alone x A^T is enough
        kept = [inner if of_B and (little or not of_x) else None for inner, little in zip(inners, small, strict=True)]
        save(ctx, x if of_x else None, *factors, *kept)
        return _no_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.base.check()
        x, *rest = taken(ctx)  # asked for once: blocks that are computed again give them once
        factors, inners = rest[: 2 * len(ctx.lows)], rest[2 * len(ctx.lows) :]
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = None
        if ctx.needs_input_grad[3]:
            dtype = compute_dtype(ctx.module, g) if is_quantized(ctx.module) else g.dtype
            dx = (g.to(dtype) @ matrix(ctx.module).to(dtype)).to(g.dtype)
        x = x if x is None else x.reshape(-1, x.shape[-1])
        needs = ctx.needs_input_grad[4:]
        gradients: list[Tensor | None] = []
        for low, *each in zip(ctx.lows, factors[::2], factors[1::2], inners, needs[::2], needs[1::2], strict=True):
            gradients += low.gradients(g, x, dx, *each)
        if dx is not None:
            dx = dx.view(*gradient.shape[:-1], dx.shape[-1])
        return None, None, None, dx, *gradients


def add_products(y: Tensor, x: Tensor, lows: Sequence[Low], factors: Sequence[Tensor]) -> list[Tensor]:
    """Add the products to y [..., out] in place; the inner ones x A^T [tokens, r]."""
    flat, out, inners = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), []
    for low, A, B in zip(lows, factors[::2], factors[1::2], strict=True):
        inners.append(low.inner(flat, A).to(y.dtype))
        out[:, low.start : low.stop].addmm_(inners[-1], B.to(y.dtype).T, alpha=low.scale)
    return inners


def _no_view(y: Tensor) -> Tensor:
    """y as a tensor of its own: what follows may write over it, which autograd refuses for views made by a function."""
    out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return out


def products(module: Any, run: Callable[[Tensor], Tensor], tuners: Sequence[Any], x: Tensor) -> Tensor:
    """A linear layer with tuners of form 1 beside it."""
    x = in_arithmetic(x)
    width = features_of(module)[1]
    lows, factors = [], []
    for tuner in tuners:
        chosen = tuner.selecting()
        A, B, scale = factors_of(tuner) if chosen is None else (None, *chosen[1:])
        start, stop = tuner.place.part or (0, width)
        dropout = tuner.dropout if module.training else 0.0
        columns = None if chosen is None else chosen.A
        lows.append(Low(start, stop, float(scale), dropout, _seed(dropout), columns))
        factors += [A, B]
    return _Products.apply(module, run, lows, x, *factors)


class _Scaled(torch.autograd.Function):
    r"""A frozen linear layer and a product beside it, every feature of their sum u scaled: y = c u + b.

    u = x W^T + s x' A^T B^T, x' = x under the dropout mask. With g the gradient of y and h = c g: dc = sum g u, and dx,
    dA and dB are those of ``_Products`` for h. u is y / c where y is kept for it (so that b must be 0, and a c of 0 not
    quite 0), else it is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, module: Any, run: Any, low: Low, keeps: bool, x: Tensor, A: Tensor, B: Tensor, c: Tensor, b: Tensor
    ) -> Tensor:
        y = run(x).sub_(b)
        add_products(y, x, [low], [A, B])
        c = c.masked_fill(c == 0, 1e-30) if keeps else c
        y = _no_view(y.mul_(c.to(y.dtype)).add_(b))
        ctx.module, ctx.low, ctx.keeps, ctx.base = module, low, keeps, Unchanged(module)
        save(ctx, x, A, B, c, y if keeps else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.base.check()
        (x, A, B, c, y), low = taken(ctx), ctx.low
        g = gradient.reshape(-1, gradient.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        W, of_x, mask = matrix(ctx.module).to(g.dtype), ctx.needs_input_grad[4], low.kept(x)
        inner = low.dropped(x, mask) @ A.to(g.dtype).T
        if ctx.keeps:
            dc = (y.view(g.shape) * g).sum(0) / c
        else:
            dc = (x @ W.T).addmm_(inner, B.to(g.dtype).T, alpha=low.scale).mul_(g).sum(0)
        h = g * c.to(g.dtype)
        dx = h @ W if of_x else None
        dA, dB = low.gradients(h, x, dx, A, B, inner, *ctx.needs_input_grad[5:7], mask)
        if dx is not None:
            dx = dx.view(*gradient.shape[:-1], dx.shape[-1])
        return None, None, None, None, dx, dA, dB, dc.to(c.dtype), None


KEPT_BY_THE_MODEL = ("attention.v", "mlp.gate", "mlp.up")
"""Roles whose outputs the operation behind them keeps in any case."""


def scaled(tuner: Any, base: Any, x: Tensor, factors: Factors, gain: Tensor, bias: Tensor) -> Tensor:
    """``gain * (x W^T + scale * dropout(x) A^T B^T) + bias`` of a tuner whose ``base`` is ``x W^T + bias``.

    Shapes: gain and bias [out].
    """
    A, B, scale = factors
    dropout = tuner.dropout if tuner.training else 0.0
    module = getattr(base, "module", None)
    if acts(dropout > 0) and module is not None and is_linear(module):
        x = in_arithmetic(x)
        low = Low(0, len(B), float(scale), dropout, _seed(dropout))
        dear = tuner.place.role.endswith(KEPT_BY_THE_MODEL) or A.shape[1] > len(B)  # or costs most to make again
        keeps = dear and module._parameters.get("bias") is None
        return _Scaled.apply(module, base, low, keeps, x, A, B, gain, bias)
    y = base(x)
    change = F.linear(F.linear(F.dropout(x, dropout), A.to(x.dtype)), B.to(x.dtype)) * scale
    return y + (gain - 1).to(y.dtype) * (y - bias) + gain.to(y.dtype) * change.to(y.dtype)


def _seed(dropout: float) -> int:
    """Of the mask: drawn from torch's own random numbers, so that a run can be repeated."""
    return int(torch.randint(2**62, ())) if dropout else 0


def factors_of(tuner: Any) -> Factors:
    """A and B of a tuner; what is computed of its parameters is computed again for the backward pass."""
    A, B, scale = tuner.factors()
    learned_scale = isinstance(scale, Tensor)
    if A.grad_fn is not None:
        A = again(lambda: tuner.factors().A)
    if B.grad_fn is not None or learned_scale:
        B = again(lambda: tuner.factors().B * (tuner.factors().scale if learned_scale else 1))
    return Factors(A, B, 1.0 if learned_scale else scale)


def in_arithmetic(x: Tensor) -> Tensor:
    """x in the dtype of autocast, where that acts."""
    device = x.device.type
    return cast(x, torch.get_autocast_dtype(device)) if autocasts(device) else x


class _Effective(torch.autograd.Function):
    r"""A linear layer with a weight that its tuners make of the frozen one: y = x W'^T + b', W' = f(W; theta).

    With g the gradient of y: dx = g W', dW' = g^T x, db' = sum g, and theta gets its gradients through f, which is
    run again for the backward pass: neither W' nor anything on the way to it is kept, only x where dW' is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, module: Any, tuners: Any, values: list[Any], chance: Any, x: Tensor, *theta: Tensor
    ) -> Tensor:
        weight, bias = values
        ctx.module, ctx.tuners, ctx.chance, ctx.theta, ctx.dtype = module, tuners, chance, theta, x.dtype
        ctx.base = Unchanged(module, *theta)
        save(ctx, x if weight.requires_grad else None)
        ctx.arithmetic = arithmetic(x.device.type)
        values.clear()
        return _no_view(F.linear(x.to(weight.dtype), weight, bias).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.base.check()
        with torch.enable_grad(), ctx.chance.again(), ctx.arithmetic:
            weight, bias = _made(ctx.module, ctx.tuners, gradient)
        g = gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[4]:
            dx = (g @ weight.detach()).to(ctx.dtype).view(*gradient.shape[:-1], weight.shape[1])
        outputs, given = [], []
        if weight.requires_grad:
            (x,) = taken(ctx)
            outputs.append(weight)
            given.append(g.T @ x.reshape(-1, x.shape[-1]).to(weight.dtype))
        if bias is not None and bias.requires_grad:
            outputs.append(bias)
            given.append(g.sum(0))
        found = torch.autograd.grad(outputs, ctx.theta, given, allow_unused=True) if ctx.theta else ()
        return None, None, None, None, dx, *found


def _made(module: Any, tuners: Sequence[Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The effective weight [out, in] and bias, in the dtype in which the layer multiplies."""
    values = effective(list(tuners), base_tensors(module))
    dtype = compute_dtype(module, x) if is_quantized(module) else x.dtype
    weight = values["weight"] if is_quantized(module) else to_matrix(_kind(module), values["weight"])
    bias = values["bias"]
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def multiplied(module: Any, tuners: Sequence[Any], x: Tensor) -> Tensor:
    """x times the effective weight, in the dtype of x."""
    weight, bias = _made(module, tuners, x)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def weighted(module: Any, tuners: Sequence[Any], x: Tensor) -> Tensor:
    """A linear layer with tuners that act through its effective weight."""
    x, chance = in_arithmetic(x), Chance(x)
    with structure():
        values = list(_made(module, tuners, x))
    return _Effective.apply(module, tuners, values, chance, x, *leaves(*values))
