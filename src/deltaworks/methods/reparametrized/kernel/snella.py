"""SNELLA: SNELL with a richer kernel, and a shrinking budget of changed entries that moves to the layers that matter.

Paper: Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models, Shen et al., 2025,
arXiv:2510.24037. The formulas are those of its code (reconstructed; the text could not be compared).

Formula: K = D + alpha softmax(D / gamma) + beta with D as in `snell`, the softmax over the outputs of each input, alpha
and gamma 1 and beta 0 at first and trained; W' = W + K |K| for the v_l entries of layer l with the largest |K|. Scores:
I = |w g| for w in A, B; Ibar <- b Ibar + (1 - b) I; U <- b U + (1 - b) |I - Ibar|; S_l = mean(Ibar U) of A and of B
added, over their sum. In round t of T: B(t) = B1 + (B0 - B1) (1 - (t - t_i) / (T - t_i - t_f))^3 entries of all layers
together, B0 up to t_i and B1 in the last t_f; v_l = min(size, B S_l), and the rest goes to layers with room by score.
With both s 0, W' = W + K (the code: "mixk").
Count: r (in + out) + 3 for each weight (ViT-B/16, r = 32: 5,308,632).
Departure: gamma is exp of what is trained, so that it stays positive; I takes weight and gradient of the same step.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.kernel.competition import CompetitionProcedure
from deltaworks.methods.reparametrized.kernel.snell import SNELL, SNELLTuner, distances, sparsified, staying


class SNELLATuner(SNELLTuner):
    """A, B and the three numbers of the mixed kernel; ``entries`` tells how many entries may change."""

    entries: Tensor

    def __init__(self, site: Site, config: "SNELLA") -> None:
        super().__init__(site, config)
        self.alpha, self.gamma, self.beta = site.ones(), site.zeros(), site.zeros()
        self.size = site.shape[0] * site.shape[1]
        self.kept, self.dense = staying(self.size, config.initial), config.initial == config.sparsity == 0
        self.register_buffer("entries", torch.tensor([self.kept]))

    def change(self, A: Tensor, B: Tensor, *others: Tensor) -> Tensor:
        alpha, gamma, beta = others
        D = distances(A, B, self.coefficient)
        mixed = D + alpha * (D / gamma.exp()).softmax(dim=0) + beta
        return mixed if self.dense else sparsified(mixed, self.kept, self.rule)

    def inputs(self) -> tuple[Tensor, ...]:
        return (self.A, self.B, self.alpha, self.gamma, self.beta)

    def allow(self, entries: int) -> None:
        """Let this many entries change."""
        self.kept = entries
        self.entries.fill_(entries)

    def constants(self) -> tuple[int, ...]:
        return (self.kept,)

    def fill(self, tensors: Mapping[str, Tensor], expected: Collection[str]) -> None:
        entries = tensors.get("entries")
        if entries is not None and (entries.is_floating_point() or not 0 <= int(entries.max()) <= self.size):
            raise UserError(f"'entries' must be a whole number up to {self.size}")
        super().fill(tensors, expected)
        self.kept = int(self.entries)


@method(
    "snella",
    family="reparametrized/kernel",
    paper="Shen et al., 2025, arXiv:2510.24037",
    kinds=("linear", "conv1d"),
    tuner=SNELLATuner,
    identity=False,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "the number of entries of each adapter is another, so that switching compiles again"},
)
class SNELLA(SNELL):
    rank: int = option(32, "r: the width of both factors, half of it for each kernel", least=2)
    sparsity: float = option(0.9, "s at the end, of all layers together", least=0, most=1)
    initial: float = option(0.0, "s of every layer at the start", least=0, most=1)
    rounds: int = option(100, "T: in how many rounds the budget shrinks (the code: epochs)", least=1)
    warmup: float = option(0.0, "t_i, the share of the rounds with the first budget", least=0, most=1)
    final: float = option(0.0, "t_f, the share of the rounds with the last budget", least=0, most=1)
    smoothing: float = option(0.85, "b of the moving averages", least=0, most=1)

    def procedure(self, delta: Any) -> Procedure:
        return CompetitionProcedure(delta, self)
