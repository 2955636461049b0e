"""LoRA-XS: an r x r matrix between frozen factors that hold the principal singular vectors of the weight.

Paper: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, Balazy et al., 2024, arXiv:2405.17604.

Formula: W' = W + s B R A, with W = U S V^T; A = S_r V_r^T [r, in], B = U_r [out, r] frozen, R [r, r] trained,
s = alpha / r. A and B come from a randomised SVD (ten power iterations), the largest entry of each column of B
positive; they depend on the base and the seed alone.
Count: sum of r^2. Stored: R; A and B are made again from the base when an adapter is loaded.
Departure: R starts at 0, the published N(0, 1e-5^2) being less than one step away, so that step 0 is the base exactly.
"""

import torch
from torch import Tensor

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site

OVERSAMPLED, ITERATIONS = 10, 10


def principal(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A = S_r V_r^T [rank, in] and B = U_r [out, rank] of ``matrix`` [out, in], float32 (Halko et al., 2011, 4.4)."""
    matrix = matrix.float()
    width = min(rank + OVERSAMPLED, *matrix.shape)
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)).Q
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    B = (Q @ U)[:, :rank]
    sign = B.gather(0, B.abs().argmax(0, keepdim=True)).sign()  # [1, rank]: a singular vector has no sign of its own
    return (S[:rank] * sign[0])[:, None] * Vh[:rank], B * sign


class LoRAXSTuner(Tuner):
    """R [r, r] between the frozen A [r, in] and B [out, r]."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: "LoRAXS") -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        if site.device.type == "meta":
            A, B = torch.empty(config.rank, inner, device="meta"), torch.empty(out, config.rank, device="meta")
        else:
            A, B = principal(site.matrix.detach(), config.rank, site.generator)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.R = site.zeros(config.rank, config.rank)
        self.scale = config.alpha / config.rank  # type: ignore[operator]
        self.dropout = config.dropout

    def factors(self) -> Factors:
        return Factors(self.R @ self.A, self.B, self.scale)


@method(
    "lora-xs",
    family="reparametrized/low-rank",
    paper="Balazy et al., 2024, arXiv:2405.17604",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=LoRAXSTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
    small={"rank": 4},
)
class LoRAXS(Config):
    targets: str = option("linear", "every linear layer inside the blocks")
    rank: int = option(16, "side r of the trained matrix, and rank of the change", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    dropout: float = option(0.0, "dropout on the input of A", least=0, most=0.99)
