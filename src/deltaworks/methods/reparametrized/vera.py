"""VeRA: one random pair of matrices for the whole model; each weight trains two vectors that scale it.

Paper: VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al., 2023, arXiv:2310.11454 (ICLR).

Formula: W' = W + diag(b) B diag(d) A, with A [r, in], B [out, r] frozen and random, b [out], d [r] trained. A and B
are cut from one pair A [r, largest in], B [largest out, r] that all weights share: A ~ U(+-sqrt(6 / largest in)),
B ~ U(+-sqrt(6 / r)) (Kaiming-uniform); b = 0, d = 0.1.
Count: sum of out + r. Stored: b and d; the pair is made again from the seed.
Departure: the pair is drawn from the adapter's seed and never stored, which the published code offers as an option.
"""

import torch
from torch import Tensor, nn

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class Projection(nn.Module):
    """The shared random pair: A [r, largest in], B [largest out, r]."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: "VeRA") -> None:
        super().__init__()
        outs, inners = zip(*(site.at(place).shape for place in config.places(site.anatomy)), strict=True)
        A, B = torch.empty(config.rank, max(inners)), torch.empty(max(outs), config.rank)
        generator = torch.Generator().manual_seed(site.seed)  # as huggingface/peft draws them from its key
        for name, matrix in (("A", A), ("B", B)):
            bound = (6 / matrix.shape[1]) ** 0.5
            self.register_buffer(name, matrix.uniform_(-bound, bound, generator=generator).to(site.device), False)


class VeRATuner(Tuner):
    """The vectors b [out] and d [r] of one weight."""

    def __init__(self, site: Site, config: "VeRA") -> None:
        super().__init__()
        self.projection = site.shared(("vera", site.member), lambda: Projection(site, config))
        self.out, self.inner = site.shape
        self.b = site.zeros(self.out)
        self.d = nn.Parameter(torch.full((config.rank,), config.initial, device=site.device))
        self.dropout = config.dropout

    def factors(self) -> Factors:
        A, B = self.projection.A[:, : self.inner], self.projection.B[: self.out]
        return Factors(self.d[:, None] * A, self.b[:, None] * B)


@method(
    "vera",
    family="reparametrized/low-rank",
    paper="Kopiczko et al., 2023, arXiv:2310.11454",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=VeRATuner,
    learning_rate=3e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class VeRA(Config):
    targets: str = option("linear", "the paper: attention.q,attention.v")
    rank: int = option(256, "rank r of the shared pair; the paper: 256 to 1024", least=1)
    initial: float = option(0.1, "value that d starts at; the paper: 1 fails")
    dropout: float = option(0.0, "dropout on the input of A", least=0, most=0.99)
