"""BOFT: the inputs of a weight are rotated by a butterfly of small blocks, its outputs scaled.

Paper: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, Liu et al., 2023, arXiv:2311.06243 (ICLR).

Formula: y = s * (W R^T x) + b, s [out], R = R_m .. R_1, each block-diagonal in blocks of b inputs that stand 2^(i-2) b
apart in halves: for i > 1 the inputs are cut into groups of 2^(i-1) b, and the k-th b / 2 inputs of the two halves of
a group make a block; R_1 takes neighbours. Blocks are (I - Q)(I + Q)^-1 with Q = (A - A^T) / 2, A [m, in / b, b, b].
With m = log2(in / b) + 1 every input reaches every other one. With m = 1 and s = 1 it is OFT.
Count: m in b + out for each weight, of which m in (b - 1) / 2 + out are effective.
Departure: without its compiled extension the published layer falls back to m = 1; here any m runs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.lean.remaking import again
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.orthogonal.rotations import block_size, cayley, turned


def paired(x: Tensor, side: int, level: int) -> Tensor:
    """x [..., in] with the inputs of each block of a level (from 0) side by side."""
    return x if not level else x.unflatten(-1, (-1, 2, 2**level, side // 2)).transpose(-3, -2).flatten(-4)


def unpaired(x: Tensor, side: int, level: int) -> Tensor:
    """The inverse of ``paired``."""
    return x if not level else x.unflatten(-1, (-1, 2**level, 2, side // 2)).transpose(-3, -2).flatten(-4)


class BOFTTuner(Tuner):
    """``blocks`` [m, in / b, b, b], of which the skew-symmetric part counts, and ``scale`` [out]."""

    decays = False

    def __init__(self, site: Site, config: "BOFT") -> None:
        super().__init__()
        out, inner = site.shape
        self.side = block_size(config.name, site, config.block, config.blocks, 4, config.factors)
        self.blocks = site.zeros(config.factors, inner // self.side, self.side, self.side)
        self.scale = site.ones(out)
        self.biased = site.bias is not None

    def rotations(self) -> Tensor:
        """R [m, in / b, b, b]."""
        return cayley((self.blocks - self.blocks.mT) / 2)

    def weight(self, weight: Tensor) -> Tensor:
        for level, R in enumerate(self.rotations().mT.to(weight.dtype)):  # W R_1^T R_2^T ..
            weight = unpaired(turned(paired(weight, self.side, level), R), self.side, level)
        return weight * self.scale.to(weight.dtype)[:, None]


class LinearBOFTTuner(BOFTTuner):
    """The same where the operation is a matrix product: the input is rotated, and the weight never touched."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        # the bias as the operation adds it: another tuner may have changed it
        bias = base(x.new_zeros(1, x.shape[-1]))[0] if self.biased else None
        y = base(again(self.rotated, x))
        scale = self.scale.to(y.dtype)
        return y * scale if bias is None else (y - bias) * scale + bias

    def rotated(self, x: Tensor) -> Tensor:
        """x R_m .. R_1"""
        for level, R in reversed(list(enumerate(self.rotations().to(x.dtype)))):
            x = unpaired(turned(paired(x, self.side, level), R), self.side, level)
        return x


@method(
    "boft",
    family="reparametrized/orthogonal",
    paper="Liu et al., 2023, arXiv:2311.06243",
    kinds=("linear", "conv1d", "conv2d"),
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
)
class BOFT(Config):
    targets: str = option("linear", "the paper: attention projections, better every linear layer")
    block: int | None = option(
        None, "side b of a block, taken to the nearest divisor of the inputs; default: 4", least=2
    )
    blocks: int | None = option(None, "number in / b of blocks, instead of their side", least=1)
    factors: int = option(1, "butterfly factors m; with 1 inputs meet within their block alone", least=1, most=20)

    def tuner(self, site: Site) -> Tuner:
        return (LinearBOFTTuner if site.place.kind in ("linear", "conv1d") else BOFTTuner)(site, self)
