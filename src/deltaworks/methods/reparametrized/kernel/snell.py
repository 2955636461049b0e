"""SNELL: a full-rank change made from two thin factors by a kernel of distances, whose smallest entries are zeroed.

Paper: Expanding Sparse Tuning for Low Memory Usage, Shen et al., 2024, arXiv:2411.01800 (NeurIPS 2024).

Formula: W' = W + S(D), D_oi = sum_p c_p ||A_pi - B_po||_2 with A [2, in, r/2], B [2, out, r/2] trained and c = (0.1,
-0.1) fixed. S keeps the entries above t, the ceil(s n)-th smallest |D| of all n: soft (the paper) gives
D (|D| - t), squared (the code) D |D| with |D| held constant for the gradient; at s = 0 both leave D as it is.
Count: r (in + out) for each weight (ViT-B/16, six matrices of each block, r = 8: 1,327,104).
Departure: c is not trained, as in the code that made the paper's numbers, and so is the squared rule; t comes from
an exact selection, since a quantile refuses large layers; dropout and drop-path of the branch are left out. Not the
identity at step 0: the two distances cancel in the mean only (|W' - W| is about 1e-6 squared, 1e-3 at s = 0).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


def distances(A: Tensor, B: Tensor, coefficient: float) -> Tensor:
    """The kernel D [out, in] of A [2, in, r/2] and B [2, out, r/2]; exact where distances are tiny."""
    plus, minus = torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist").unbind(0)
    return coefficient * (plus - minus)


def sparsified(change: Tensor, kept: int, rule: str) -> Tensor:
    """The ``kept`` entries of the largest magnitude, weighed by the rule "squared" or "soft"; the others 0."""
    size = change.detach().abs()
    if kept >= size.numel():
        threshold = size.new_zeros(())
    elif kept < 1:
        return change * 0
    else:
        threshold = size.flatten().kthvalue(size.numel() - kept).values
    weight = size * (size > threshold) if rule == "squared" else (change.abs() - threshold).clamp(min=0)
    return change * weight


def staying(size: int, sparsity: float) -> int:
    """How many of ``size`` entries a share of zeroed ones leaves."""
    return size - math.ceil(round(sparsity * size, 6))


class SNELLTuner(Tuner):
    """The factors A [2, in, r/2] and B [2, out, r/2]."""

    def __init__(self, site: Site, config: "SNELL") -> None:
        super().__init__()
        if config.rank % 2:
            raise UserError(f"{config.name}: rank={config.rank} must be even, for two kernels of half of it each")
        (out, inner), half = site.shape, config.rank // 2
        self.A = site.uniform(2, inner, half, bound=(inner * half) ** -0.5)
        self.B = site.uniform(2, out, half, bound=(out * half) ** -0.5)
        self.coefficient, self.rule = config.coefficient, config.rule
        self.kept = staying(out * inner, config.sparsity)
        self.dense = config.sparsity == 0

    def inputs(self) -> tuple[Tensor, ...]:
        """What the change is made from."""
        return (self.A, self.B)

    def change(self, A: Tensor, B: Tensor, *others: Tensor) -> Tensor:
        """The change of the weight, [out, in]."""
        kernel = distances(A, B, self.coefficient)
        return kernel if self.dense else sparsified(kernel, self.kept, self.rule)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.change(*self.inputs()).to(weight.dtype)

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        """The same with the change made again in the backward pass: nothing of its size is kept."""

        def branch(x: Tensor, *inputs: Tensor) -> Tensor:
            return F.linear(x, self.change(*inputs).to(x.dtype))

        y = base(x)
        return y + checkpoint(branch, x, *self.inputs(), use_reentrant=False).to(y.dtype)


@method(
    "snell",
    family="reparametrized/kernel",
    paper="Shen et al., 2024, arXiv:2411.01800",
    kinds=("linear", "conv1d"),
    tuner=SNELLTuner,
    identity=False,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
)
class SNELL(Config):
    targets: str = option("linear", "the paper: all linear layers of the blocks")
    rank: int = option(8, "r: the width of both factors, half of it for each kernel (the paper: 8, 16, 32)", least=2)
    sparsity: float = option(
        0.9, "s: share of the change that is zeroed (searched by task: 0 to 0.995)", least=0, most=1
    )
    rule: str = option("squared", "what happens to the entries that stay", choices=("squared", "soft"))
    coefficient: float = option(0.1, "c: the scale of the kernel")
