"""Compacter and Compacter++: adapters whose matrices are sums of Kronecker products of tiny factors.

Paper: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, Karimi Mahabadi et al., 2021, arXiv:2106.04647.

Formula: z + U(f(D(z))) on the output z [..., d] of a sub-layer, before the residual sum; D: d -> m and U: m -> d are
x W + b with W [in, out] = sum_i A_i (x) s_i t_i over i = 1..n; A [n, n, n] one tensor for all adapters of the model,
down and up alike; s [n, in/n, R], t [n, R, out/n] and b [out] of each layer's own. n divides d and m.
Compacter stands after attention and feed-forward layer, Compacter++ after the feed-forward layer only.
Count: 2 R (d + m) + d + m for each adapter, and n^3 once (each, if not shared); norms=true adds all norms.
Departure: W is never built: the factors are applied in turn, with n R numbers for each of n slices between; and the
LayerNorms, which the published code trains, stay frozen unless norms=true.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.registry import method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.adapters.bottleneck import ACTIVATIONS, AdapterConfig, with_norms


def kronecker_product(x: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """``x W`` with W = sum_i A_i (x) s_i t_i (section 4, equations 4 and 6).

    Shapes: x [..., in], A [n, n, n], s [n, in/n, R], t [n, R, out/n]; returns [..., out]. Entry (p a, q b) of W is
    sum_i A_i[p, q] (s_i t_i)[a, b]: A_i holds the coarse blocks.
    """
    order, _, rank = s.shape
    slices = x.unflatten(-1, (order, -1))  # [..., p, a]
    inner = (slices @ s.transpose(0, 1).flatten(1)).unflatten(-1, (order, rank))  # [..., p, i, r]
    mixed = torch.einsum("...pir,ipq->...qir", inner, A)
    return (mixed.flatten(-2) @ t.flatten(0, 1)).flatten(-2)  # [..., q, b]


class CompacterTuner(Tuner):
    """The adapter ``z + U(f(D(z)))`` with low-rank hypercomplex D and U."""

    def __init__(self, site: Site, config: "Compacter") -> None:
        super().__init__()
        order, features = config.order, site.width
        width = config.bottleneck(features)
        for what, size in (("the width", features), ("the bottleneck", width)):
            if size % order:
                raise UserError(
                    f"{config.name}: order={order} does not divide {what} {size} at {site.place.path!r}: "
                    "choose another order, width or reduction"
                )

        def slow() -> nn.Parameter:
            std = (1e-4 if config.shared else 0.01) if config.std is None else config.std
            return site.normal(order, order, order, std=std)

        self.A = site.shared(("compacter", site.member), slow) if config.shared else slow()

        def fast(inner: int, outer: int) -> nn.Parameter:
            return site.uniform(order, inner, outer, bound=(12 / (inner + outer)) ** 0.5)  # Xavier, gain sqrt 2

        big, small, rank = features // order, width // order, config.rank
        self.down_s, self.down_t, self.down_b = fast(big, rank), fast(rank, small), site.zeros(width)
        self.up_s, self.up_t, self.up_b = fast(small, rank), fast(rank, big), site.zeros(features)
        self.activation = ACTIVATIONS[config.activation]

    def around(self, base: Callable[[Any], Tensor], x: Any) -> Tensor:
        z = base(x)
        A, down_s, down_t, down_b, up_s, up_t, up_b = (
            tensor.to(z)  # A may lie on another device than this layer
            for tensor in (self.A, self.down_s, self.down_t, self.down_b, self.up_s, self.up_t, self.up_b)
        )
        inner = self.activation(kronecker_product(z, A, down_s, down_t) + down_b)
        return z + (kronecker_product(inner, A, up_s, up_t) + up_b)


@method(
    "compacter",
    family="additive/adapters",
    paper="Karimi Mahabadi et al., 2021, arXiv:2106.04647",
    kinds=("sublayer",),
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
    small={"width": 8},
)
class Compacter(AdapterConfig):
    reduction: int = option(32, "the bottleneck is the width d of the model divided by this, rounded down", least=1)
    activation: str = option("gelu_tanh", "the non-linearity f", choices=ACTIVATIONS)
    order: int = option(4, "n: the number of Kronecker products in a sum, and the size of A_i", least=1)
    rank: int = option(1, "R: the rank of s_i t_i", least=1)
    shared: bool = option(True, "one A for all adapters of the model")
    std: float | None = option(None, "A starts as N(0, std^2); default: 1e-4 if shared, else 0.01", least=0)
    norms: bool = option(False, "train every norm in full as well, as the published code does")

    def places(self, anatomy: Any) -> list[Any]:
        places = super().places(anatomy)
        return with_norms(anatomy, places) if self.norms else places

    def tuner(self, site: Site) -> Tuner:
        return Replacement(site) if site.place.kind == "norm" else CompacterTuner(site, self)


@method(
    "compacter-plus-plus",
    family="additive/adapters",
    paper="Karimi Mahabadi et al., 2021, arXiv:2106.04647",
    kinds=("sublayer",),
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
    small={"width": 8},
)
class CompacterPlusPlus(Compacter):
    targets: str = option("mlp", "the residual sub-layers that get an adapter")
