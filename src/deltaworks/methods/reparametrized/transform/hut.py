"""HUT: every weight times an entry of two block-wise constant matrices, with a scale and a shift of the output.

Paper: HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation, Zhang et al., 2024,
arXiv:2409.13501. Reconstructed: the paper's body could not be read and there is no published code.

Formula: W' = diag(g) (F_A * W * F_B), b' = b + beta, with * entry by entry; M_A [out, r] spread over the inputs,
F_A[o, j] = M_A[o, floor(j r / in)], M_B [r, in] spread over the outputs, F_B[o, j] = M_B[floor(o r / out), j];
g [out], beta [out]. M_A = M_B = g = 1 and beta = 0 at the start. Entries of W that are 0 stay 0.
Count: r (in + out) + 2 out for each weight (768 x 768, r = 8: 13,824); r (in + out) without scale_shift.
Departure: "(M 1)^r" is read as r contiguous groups, since the product with a matrix of ones would leave the rank
without effect; where r does not divide a size, groups differ by one and none is empty.
"""

from typing import Any

import torch
from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


def groups(size: int, count: int, device: torch.device) -> Tensor:
    """The group floor(i count / size) of each index i: [size], ascending from 0 to count - 1."""
    return torch.arange(size, device=device) * count // size


def transformed(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``F_A * W * F_B``. Shapes: weight [out, in], A [out, r], B [r, in]."""
    out, inner = weight.shape
    return weight * A[:, groups(inner, A.shape[1], A.device)] * B[groups(out, B.shape[0], B.device)]


class Hadamard(torch.autograd.Function):
    """``transformed`` that keeps its inputs alone for the backward pass: nothing else of the size of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(weight, A, B)
        return transformed(weight, A, B)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        weight, A, B = ctx.saved_tensors
        (out, inner), rank = weight.shape, A.shape[1]
        across, down = groups(inner, rank, A.device), groups(out, rank, A.device)
        change, F_A, F_B = gradient * weight, A[:, across], B[down]
        # sums over the groups as products with their indicators, which add up in float32
        one = torch.eye(rank, dtype=A.dtype, device=A.device)
        to_weight = gradient * F_A * F_B if ctx.needs_input_grad[0] else None
        return to_weight, (change * F_B) @ one[across], one[down].T @ (change * F_A)


class HUTTuner(Tuner):
    """M_A [out, r], M_B [r, in] and, with scale_shift, gamma [out] and beta [out]."""

    adds = False
    decays = False  # weight decay would pull the weights to zero

    def __init__(self, site: Site, config: "HUT") -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        self.A, self.B = site.ones(out, config.rank), site.ones(config.rank, inner)
        self.gamma = site.ones(out) if config.scale_shift else None
        self.beta = site.zeros(out) if config.scale_shift else None

    def weight(self, weight: Tensor) -> Tensor:
        A = self.A if self.gamma is None else self.gamma[:, None] * self.A
        return Hadamard.apply(weight, A.to(weight.dtype), self.B.to(weight.dtype))

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if self.beta is None or bias is None:
            return self.beta if bias is None else bias
        return bias + self.beta.to(bias.dtype)


@method(
    "hut",
    family="reparametrized/transform",
    paper="Zhang et al., 2024, arXiv:2409.13501",
    kinds=("linear", "conv1d", "conv2d"),
    tuner=HUTTuner,
    learning_rate=3e-3,
    tried=(3e-4, 1e-3, 3e-3),
)
class HUT(Config):
    targets: str = option("linear", "the paper: projections of the attention")
    rank: int = option(8, "number r of groups of columns and of rows", least=1)
    scale_shift: bool = option(True, "scale and shift the output by trained vectors gamma and beta")
