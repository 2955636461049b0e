"""Parallel adapter: a bottleneck beside the feed-forward layer, which reads the layer's input.

Paper: Towards a Unified View of Parameter-Efficient Transfer Learning, He et al., 2021, arXiv:2110.04366.

Formula: out = F(x) + s (U f(D x + b_D) + b_U), F a sub-layer, x [..., d] its input (after the norm in pre-norm
blocks), D [m, d], b_D [m], U [d, m], b_U [d]; s trained (the scaled parallel adapter) or fixed (the paper: 4 or 2).
Count: 2 m d + m + d for each sub-layer, and 1 where s is trained.
Departure: none in the formula; s is trained from 1 by default, as AdapterHub and the comparisons with it have it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltaworks.core.registry import method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.adapters.bottleneck import ACTIVATIONS, AdapterConfig, Bottleneck


class ParallelTuner(Bottleneck):
    """Adds ``s (U f(D x + b_D) + b_U)`` to the output of a sub-layer with input x."""

    scale: float | nn.Parameter

    def __init__(self, site: Site, config: "Parallel") -> None:
        super().__init__(site, config)
        # shape [1]
        self.scale = nn.Parameter(site.ones(1).detach() * config.scale) if config.learned else config.scale

    def around(self, base: Callable[[Any], Tensor], x: Any) -> Tensor:
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        return base(x) + scale * self.change(x)


@method(
    "parallel",
    family="additive/adapters",
    paper="He et al., 2021, arXiv:2110.04366",
    kinds=("sublayer",),
    tuner=ParallelTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class Parallel(AdapterConfig):
    targets: str = option("mlp", "the residual sub-layers that get an adapter; attention pays at tiny budgets only")
    reduction: int = option(2, "the bottleneck is the width d of the model divided by this, rounded down", least=1)
    activation: str = option("relu", "the non-linearity f", choices=ACTIVATIONS)
    scale: float = option(1.0, "the scale s of the added vector, or where it starts")
    learned: bool = option(True, "train s, one number for each adapter (scaled parallel adapter)")
    init: str = option("identity", "identity: U = 0; normal: both matrices std 0.02", choices=("identity", "normal"))
