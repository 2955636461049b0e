"""Full fine-tuning: the baseline that trains every parameter.

Paper: the practice since BERT, Devlin et al., 2018, arXiv:1810.04805. With targets it trains whole matrices of some
operations; cross_attention.[qkvo] is attention tuning (Gheini et al., 2021, arXiv:2104.08771).

Formula: W' = V, with V a float32 master [the shape of W] that starts at W.
Count: every parameter of the model, tied ones once.
Departure: the base stays frozen beside the masters, so that the result switches, saves and detaches as any adapter.
"""

from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


@method(
    "full",
    family="baseline",
    paper="Devlin et al., 2018, arXiv:1810.04805",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    learning_rate=1e-4,
    tried=(1e-4, 3e-4, 1e-3),
)
class Full(Config):
    targets: str = option("all", "which modules to train in full; cross_attention.[qkvo] is attention tuning")

    def tuner(self, site: Site) -> Tuner | None:
        return Replacement(site) if site.place.whole else None
