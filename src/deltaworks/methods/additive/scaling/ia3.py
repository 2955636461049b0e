"""(IA)^3: learned vectors that rescale keys, values and the inner activation of the feed-forward layer.

Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, Liu et al., 2022,
arXiv:2205.05638.

Formula: keys l_k * (W_k x + b_k), values l_v * (W_v x + b_v), feed-forward W_2 (l_ff * f(W_1 x)), with l_k, l_v [d_kv]
and l_ff [d_ff]; as weights, the rows of W_k, W_v with their biases and the columns of W_2.
Count: L (d_k + d_v + d_ff) for L blocks, and d_k + d_v more for each cross-attention.
Departure: l_ff scales the input of W_2, where the published code scales a branch of a gated unit: the same product.
"""

from collections.abc import Callable

from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class IA3Tuner(Tuner):
    """The vector l, which starts at one: [out] for the rows of a weight, [in] for its columns."""

    decays = False

    def __init__(self, site: Site, config: "IA3") -> None:
        super().__init__()
        auto = "columns" if site.place.role.endswith(".down") else "rows"
        self.columns = (auto if config.scales == "auto" else config.scales) == "columns"
        out, inner = site.shape
        self.scale = site.ones(inner if self.columns else out)

    def weight(self, weight: Tensor) -> Tensor:
        scale = self.scale.to(weight.dtype)
        return weight * scale if self.columns else weight * scale[:, None]

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.columns else bias * self.scale.to(bias.dtype)

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.columns:
            return base(x * self.scale.to(x.dtype))
        y = base(x)
        return y * self.scale.to(y.dtype)


@method(
    "ia3",
    family="additive/scaling",
    paper="Liu et al., 2022, arXiv:2205.05638",
    kinds=("linear", "conv1d"),
    tuner=IA3Tuner,
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class IA3(Config):
    targets: str = option("*attention.k,*attention.v,mlp.down", "the paper: keys, values, the inner activation")
    scales: str = option(
        "auto",
        "which side of the weight; auto: the columns (the input) of a down projection, else the rows",
        choices=("auto", "rows", "columns"),
    )
