"""Pfeiffer: one bottleneck adapter in each block, after the feed-forward layer.

Paper: AdapterFusion: Non-Destructive Task Composition for Transfer Learning, Pfeiffer et al., 2020, arXiv:2005.00247.

Formula, with z the output of the feed-forward layer, x its residual, v = z + x, all [..., d], D [m, d], U [d, m]:
post-norm blocks: out = LN(v + U f(D LN(v) + b_D) + b_U), the block's own frozen norm used twice.
pre-norm blocks (T5, Llama, ViT): z + U f(D z + b_D) + b_U, before the residual sum.
Count: L (2 m d + m + d) for L blocks. also="norm" trains the norms beside it.
Departure: U starts at zero, so that step 0 is exactly the base (init=normal is AdapterHub's start), and in pre-norm
blocks the adapter reads z, not the sum z + x, which has no norm there and grows with depth. AdapterFusion, the
second stage of the paper, is not part of this method.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltaworks.core.registry import method, option
from deltaworks.methods.additive.adapters.bottleneck import ACTIVATIONS, AdapterConfig, Bottleneck


class PfeifferTuner(Bottleneck):
    """Around the norm of a post-norm block its input is v = z + x; elsewhere the sequential adapter on z."""

    def around(self, base: Callable[[Any], Tensor], x: Any) -> Tensor:
        if self.place.kind != "norm":
            return super().around(base, x)
        return base(x + self.change(base(x)))


@method(
    "pfeiffer",
    family="additive/adapters",
    paper="Pfeiffer et al., 2020, arXiv:2005.00247",
    kinds=("sublayer",),
    tuner=PfeifferTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class Pfeiffer(AdapterConfig):
    targets: str = option("mlp", "the residual sub-layers that get an adapter")
    activation: str = option("relu", "the non-linearity f", choices=ACTIVATIONS)
    init: str = option("identity", "identity: U = 0; normal: AdapterHub's, std 0.02", choices=("identity", "normal"))

    def places(self, anatomy: Any) -> list[Any]:
        norms = {place.path: place for place in anatomy.places if place.kind == "norm"}
        return [norms.get(place.after_norm, place) for place in super().places(anatomy)]
