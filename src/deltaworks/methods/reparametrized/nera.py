"""NeRA: a learned piecewise-linear function of every input feature beside the frozen layer.

Paper: Dressing the Imagination, Deshmukh et al., 2024, arXiv:2411.13901 (WACV 2026); earlier called KAN adapter.

Formula: y = W x + b + a R phi(x), phi_k(x) = sum_d sum_j max(0, 1 - |s_d x_d - t_dj| / h) c_djk for k = 1..r; gains
s [in], knots t [in, K] (-3 to 3 at the start), values c [in, K, r], read-out R [out, r], gain a [1]; h = 1, or the
distance 6 / (K - 1) of two knots, where the hats add up to 1 and can hold any linear map. Not linear in x: no merging.
Count: K r in + K in + in + r out + 1 for each weight (3072 x 3072, r = 64, K = 8: 1,797,121; K times LoRA's A).
Departure: c starts at 0, so that step 0 is the base (init=normal is the published 1e-3), and a at 1, between the 1e-3
and the 64 of the published code, whose learning rate 1e-5 goes with 64.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site

END = 3.0
"""The knots start evenly spaced from -END to END."""


def hats(x: Tensor, s: Tensor, t: Tensor, h: float) -> Tensor:
    """max(0, 1 - |s x - t| / h) for one knot. Shapes: x [..., in], s [in], t [in]; returns [..., in]."""
    return F.relu(1 - (s * x - t).abs() / h)


class Phi(torch.autograd.Function):
    """``phi`` knot by knot. It keeps its inputs alone: hats [..., in] for each of K knots would be K times the input.

    Shapes: x [..., in], s [in], t [in, K], c [in, K, r]; returns [..., r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, t: Tensor, c: Tensor, h: float) -> Tensor:
        ctx.save_for_backward(x, s, t, c)
        ctx.h = h
        found = x.new_zeros(*x.shape[:-1], c.shape[2])
        for j in range(t.shape[1]):
            found = found + hats(x, s, t[:, j], h) @ c[:, j]
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, s, t, c = ctx.saved_tensors
        rows = tuple(range(x.dim() - 1))
        to_inner, to_t, to_c = torch.zeros_like(x), [], []
        for j in range(t.shape[1]):
            hat = hats(x, s, t[:, j], ctx.h)
            to_c.append(hat.flatten(0, -2).T @ gradient.flatten(0, -2))
            slope = -(s * x - t[:, j]).sign() * (hat > 0) / ctx.h
            step = (gradient @ c[:, j].T) * slope  # the gradient of s x
            to_t.append(-step.sum(rows))
            to_inner = to_inner + step
        return to_inner * s, (to_inner * x).sum(rows), torch.stack(to_t, dim=1), torch.stack(to_c, dim=1), None


class NeRATuner(Tuner):
    """Gains s, knots t, values c, read-out R and, if it is trained, the gain a."""

    decays = False  # weight decay would pull the gains, which start at one, to zero

    def __init__(self, site: Site, config: "NeRA") -> None:
        super().__init__()
        out, inner = site.shape
        rank, knots = config.rank, config.knots
        self.half_width = 1.0 if config.hats == "unit" else 2 * END / (knots - 1)
        self.s, self.t = site.ones(inner), site.zeros(inner, knots)
        with torch.no_grad():
            self.t.add_(torch.linspace(-END, END, knots, device=site.device))
        zero = config.init == "zero"
        self.c = site.zeros(inner, knots, rank) if zero else site.normal(inner, knots, rank, std=1e-3)
        self.R = site.kaiming(out, rank)
        self.a = nn.Parameter(torch.full((1,), config.scale, device=site.device), requires_grad=config.train_scale)

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        s, t, c = (tensor.to(x.dtype) for tensor in (self.s, self.t, self.c))
        return base(x) + F.linear(Phi.apply(x, s, t, c, self.half_width), (self.a * self.R).to(x.dtype))


@method(
    "nera",
    family="additive/adapters",
    paper="Deshmukh et al., 2024, arXiv:2411.13901",
    kinds=("linear", "conv1d"),
    tuner=NeRATuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class NeRA(Config):
    targets: str = option("linear", "the paper: attention.q,attention.k,attention.v,attention.o")
    rank: int = option(16, "width r of the bottleneck; the paper's image model: 64", least=1)
    knots: int = option(8, "K: hats for each input feature", least=2)
    scale: float = option(1.0, "the output gain a at the start; the published code: 1e-3, and 64 for its image model")
    train_scale: bool = option(True, "train the output gain too")
    hats: str = option("unit", "half-width h: 1, or the spacing of the knots", choices=("unit", "spacing"))
    init: str = option("zero", "zero: c = 0; normal: the published N(0, 1e-3^2)", choices=("zero", "normal"))
