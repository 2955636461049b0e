"""LoHa: the weight change is the element-wise product of two low-rank products, so its rank can reach r^2.

Papers: LyCORIS, Yeh et al., 2023, arXiv:2309.14859; the idea is FedPara's, Hyeon-Woo et al., 2021, arXiv:2108.06098.

Formula: W' = W + s (B1 A1) * (B2 A2), with B1, B2 [out, r], A1, A2 [r, in], s = alpha / r. The product of two
low-rank matrices entry by entry is a low-rank matrix again: B A with the r^2 columns B1_i * B2_j of B [out, r^2] and
the r^2 rows A1_i * A2_j of A [r^2, in], so nothing of the size of the weight is formed.
Start: B1 ~ N(0, 0.1^2), A1 and A2 ~ N(0, 1), B2 = 0.
Count: sum of 2 r (in + out), twice that of LoRA.
Departure: the published code forms the change in each forward, and scales it twice on one path where it merges.
"""

from torch import Tensor

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class LoHaTuner(Tuner):
    """The factors B1, B2 [out, r] and A1, A2 [r, in] of one weight."""

    def __init__(self, site: Site, config: "LoHa") -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        self.B1, self.A1 = site.normal(out, config.rank, std=0.1), site.normal(config.rank, inner)
        self.B2, self.A2 = site.zeros(out, config.rank), site.normal(config.rank, inner)
        self.scale: float = config.alpha / config.rank  # type: ignore[operator]

    def factors(self) -> Factors:
        A = (self.A1[:, None] * self.A2[None]).flatten(0, 1)
        B = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)
        return Factors(A, B, self.scale)

    def weight(self, weight: Tensor) -> Tensor:
        change = (self.B1 @ self.A1) * (self.B2 @ self.A2)
        return weight + (self.scale * change).to(weight.dtype)


@method(
    "loha",
    family="reparametrized/kronecker",
    paper="Yeh et al., 2023, arXiv:2309.14859",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=LoHaTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class LoHa(Config):
    targets: str = option("linear", "every linear layer inside the blocks")
    rank: int = option(8, "rank r of each factor; the change can have r^2", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
