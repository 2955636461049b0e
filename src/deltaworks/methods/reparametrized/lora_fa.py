"""LoRA-FA: LoRA with A frozen at its random start, so that no layer's input is kept for the backward pass.

Paper: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, Zhang et al., 2023,
arXiv:2308.03303.

Formula: W' = W + s B A, with A [r, in] frozen and random, B [out, r] trained, s = alpha / r. The gradient of B
needs A x [tokens, r] alone, never x [tokens, in].
Count: sum of r out. Stored: B; A is made again from the seed.
Departure: libraries also multiply the gradient of B by (A A^T)^-1 / s^2 in an optimizer of their own; the paper's
first version does not, and any optimizer serves here.
"""

from torch import Tensor

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class LoRAFATuner(Tuner):
    """B [out, r], which starts at zero, over a frozen A [r, in]."""

    A: Tensor

    def __init__(self, site: Site, config: "LoRAFA") -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        # a token reads one column of an embedding's A, so its entries are of the size that A x has elsewhere
        A = site.normal(config.rank, inner) if site.place.kind == "embedding" else site.kaiming(config.rank, inner)
        self.register_buffer("A", A.detach(), persistent=False)
        self.B = site.zeros(out, config.rank)
        self.scale = config.alpha / config.rank  # type: ignore[operator]
        self.dropout = config.dropout

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.scale)


@method(
    "lora-fa",
    family="reparametrized/low-rank",
    paper="Zhang et al., 2023, arXiv:2308.03303",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=LoRAFATuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class LoRAFA(Config):
    targets: str = option("linear", "every linear layer inside the blocks")
    rank: int = option(8, "rank r of the change", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    dropout: float = option(0.0, "dropout on the input of A", least=0, most=0.99)
