"""KronA_B and KronA_B^res: a Kronecker product beside the feed-forward.

Paper: KronA, Edalati et al., 2022, arXiv:2212.10650.

Formula: y = FFN(x) + s (A (x) B) x, with A [a1, a2], B [b1, b2], a1 b1 = a2 b2 = d; KronA_B^res adds s_res x, with a
trained scalar s_res. No non-linearity, and as x passes beside the feed-forward, no weight can hold it.
Count: for each feed-forward a1 a2 + b1 b2 = 2 d where d has a divisor near its root; s_res adds 1.
Departure: there is no published code; B = 0 and s_res = 0 at the start are our choice, so that the base is unchanged.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.krona import balanced, kronecker


class ParallelTuner(Tuner):
    """``s (A (x) B) x + s_res x`` beside a sub-layer."""

    def __init__(self, site: Site, config: "KronAB") -> None:
        super().__init__()
        a1, a2 = balanced(site.width, site.width)
        self.A, self.B = site.kaiming(a1, a2), site.zeros(site.width // a1, site.width // a2)
        self.residual = site.zeros(1) if config.residual else None
        self.scale = config.scale

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        y = base(x) + kronecker(x, self.A.to(x.dtype), (self.scale * self.B).to(x.dtype))
        return y if self.residual is None else y + self.residual.to(x.dtype) * x


@method(
    "krona-b",
    family="additive/adapters",
    paper="Edalati et al., 2022, arXiv:2212.10650",
    kinds=("sublayer",),
    tuner=ParallelTuner,
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class KronAB(Config):
    targets: str = option("mlp", "the sub-layers to stand beside; the paper: every feed-forward")
    scale: float = option(1.0, "s, tuned together with the learning rate", least=0)
    residual: bool = option(False, "KronA_B^res: add s_res x, with a trained scalar s_res that starts at 0")
