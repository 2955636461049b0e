"""Houlsby: two bottleneck adapters in each block, after the attention and after the feed-forward layer.

Paper: Parameter-Efficient Transfer Learning for NLP, Houlsby et al., 2019, arXiv:1902.00751.

Formula: A(z) = z + U f(D z + b_D) + b_U on the output z [..., d] of a sub-layer, after its projection and dropout and
before the residual sum; D [m, d], b_D [m], U [d, m], b_U [d]. Cross-attention gets none.
Count: 2 L (2 m d + m + d) for L blocks; norms=true adds 2 d for each LayerNorm (d for each RMS norm).
Departure: U starts at zero, so that step 0 is exactly the base, and the LayerNorms, which the paper trains too, stay
frozen unless norms=true; init=truncated is the paper's start, init=normal with activation=silu that of AdapterHub.
"""

from typing import Any

from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.registry import method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.adapters.bottleneck import AdapterConfig, Bottleneck, with_norms


@method(
    "houlsby",
    family="additive/adapters",
    paper="Houlsby et al., 2019, arXiv:1902.00751",
    kinds=("sublayer",),
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class Houlsby(AdapterConfig):
    init: str = option(
        "identity",
        "identity: U = 0; truncated: the paper's, std 1e-3; normal: AdapterHub's, std 0.02",
        choices=("identity", "truncated", "normal"),
    )
    norms: bool = option(False, "train every norm in full as well, as the paper does")

    def places(self, anatomy: Any) -> list[Any]:
        places = super().places(anatomy)
        return with_norms(anatomy, places) if self.norms else places

    def tuner(self, site: Site) -> Tuner:
        return Replacement(site) if site.place.kind == "norm" else Bottleneck(site, self)
