"""SSL and SSB: the columns of a frozen weight are scaled, or its columns and its rows.

Paper: See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of Decomposition, Si, Yang and Shen,
2024, arXiv:2407.05417.

Formula: SSL: y = W (a * x) + b, W' = W diag(a); SSB: y = c * (W (a * x)) + b, W' = diag(c) W diag(a); a [in], c [out]
start at one. The bias is not scaled. With a = 1, SSB is (IA)^3 on the weight.
Count: SSL in, SSB in + out for each weight.
Departure: none; which weights are tuned is reconstructed from the published counts: two attention projections and the
first layer of the feed-forward.
"""

from collections.abc import Callable

from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site

TARGETS = "*attention.q,*attention.v,mlp.up"


class SSLTuner(Tuner):
    """``columns`` [in], the vector a."""

    decays = False

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.columns = site.ones(site.shape[1])

    def weight(self, weight: Tensor) -> Tensor:
        return weight * self.columns.to(weight.dtype)

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return base(x * self.columns.to(x.dtype))


class SSBTuner(SSLTuner):
    """``columns`` [in] and ``rows`` [out], the vectors a and c."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config)
        self.rows = site.ones(site.shape[0])
        self.biased = site.bias is not None

    def weight(self, weight: Tensor) -> Tensor:
        return super().weight(weight) * self.rows.to(weight.dtype)[:, None]

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # the bias as the operation adds it: another tuner may have changed it
        bias = base(x.new_zeros(1, x.shape[-1]))[0] if self.biased else None
        y = super().around(base, x)
        rows = self.rows.to(y.dtype)
        return y * rows if bias is None else (y - bias) * rows + bias


@method(
    "ssl",
    family="reparametrized/scaling",
    paper="Si et al., 2024, arXiv:2407.05417",
    kinds=("linear", "conv1d"),
    tuner=SSLTuner,
    learning_rate=3e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class SSL(Config):
    targets: str = option(TARGETS, "whose columns are scaled")


@method(
    "ssb",
    family="reparametrized/scaling",
    paper="Si et al., 2024, arXiv:2407.05417",
    kinds=("linear", "conv1d"),
    tuner=SSBTuner,
    learning_rate=3e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class SSB(Config):
    targets: str = option(TARGETS, "whose columns and rows are scaled")
