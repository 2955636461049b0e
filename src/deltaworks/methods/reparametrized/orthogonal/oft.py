"""OFT: the inputs of a weight are rotated, slice by slice.

Paper: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, Qiu et al., 2023, arXiv:2306.07280; on inputs, with
a series: Orthogonal Finetuning Made Scalable, Qiu et al., 2025, arXiv:2506.19847 (OFTv2).

Formula: y = W R^T x + b with R = blockdiag(R_1 .. R_g), g = in / b, so that the angles between rows of W stay within
each block: R_i = (I - Q_i)(I + Q_i)^-1, Q_i [b, b] skew-symmetric of b (b - 1) / 2 trained values (strict upper
triangle, row by row). Series: R_i = I + 2 Q_i + 2 Q_i^2 + 2 Q_i^3 + Q_i^4, nearly orthogonal, for the inverse
rotation (I + Q_i)(I - Q_i)^-1, as published. Constrained (COFT): after each step ||Q_i||_F is cut to eps / sqrt(g), to
eps with one R_i for all slices.
Count: (in / b) b (b - 1) / 2 for each weight, or b (b - 1) / 2 with one R_i for all slices.
Departure: none in the formula; the inverse is exact unless the series is asked for, which the published layer takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.orthogonal.rotations import block_size, cayley, turned


class OFTTuner(Tuner):
    """``triangle`` [g or 1, b (b - 1) / 2], the entries of Q above the diagonal."""

    def __init__(self, site: Site, config: "OFT") -> None:
        super().__init__()
        self.side = block_size(config.name, site, config.block, config.blocks, 32)
        self.slices = site.shape[1] // self.side
        self.triangle = site.zeros(1 if config.share else self.slices, self.side * (self.side - 1) // 2)
        self.series, self.dropout = config.series, config.dropout

    def skew(self) -> Tensor:
        """Q [g or 1, b, b]."""
        rows, columns = torch.triu_indices(self.side, self.side, 1, device=self.triangle.device)
        upper = self.triangle.new_zeros(len(self.triangle), self.side, self.side)
        upper = upper.index_put((torch.arange(len(upper), device=upper.device)[:, None], rows, columns), self.triangle)
        return upper - upper.mT

    def rotations(self, Q: Tensor) -> Tensor:
        """R [g or 1, b, b]."""
        if not self.series:
            return cayley(Q)
        square = Q @ Q
        return torch.eye(self.side, dtype=Q.dtype, device=Q.device) + 2 * (Q + square + square @ Q) + square @ square

    def weight(self, weight: Tensor) -> Tensor:
        return turned(weight, self.rotations(self.skew()).mT.to(weight.dtype))


class LinearOFTTuner(OFTTuner):
    """The same where the operation is a matrix product: the input is rotated, and the weight never touched."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        Q = self.skew()
        if self.dropout and self.training:  # slices that are not rotated
            kept = torch.rand(self.slices, 1, 1, device=Q.device) >= self.dropout
            Q = Q * kept
        return base(turned(x, self.rotations(Q).to(x.dtype)))


class Projection(Procedure):
    """Constrained OFT: no block moves further from the identity than the radius."""

    def __init__(self, delta: Any, config: "OFT") -> None:
        super().__init__(delta)
        self.config = config

    @torch.no_grad()
    def stepped(self) -> None:
        for tuner in self.delta.tuners():
            if isinstance(tuner, OFTTuner) and tuner.config is self.config:
                norm = 2**0.5 * torch.linalg.vector_norm(tuner.triangle, dim=1, keepdim=True)  # ||Q_i||_F
                radius = self.config.eps / len(tuner.triangle) ** 0.5  # type: ignore[operator]
                tuner.triangle.mul_(radius / norm.clamp(min=radius))

    def details(self) -> dict[str, Any]:
        own: list[Any] = [item for item in self.delta.attached if item.tuner.config is self.config]
        return {"oft_turned": {item.key: float(2**0.5 * item.tuner.triangle.detach().norm()) for item in own}}


@method(
    "oft",
    family="reparametrized/orthogonal",
    paper="Qiu et al., 2023, arXiv:2306.07280",
    kinds=("linear", "conv1d", "conv2d"),
    learning_rate=1e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class OFT(Config):
    targets: str = option("linear", "the paper: attention projections")
    block: int | None = option(
        None, "side b of a block, taken to the nearest divisor of the inputs; default: 32", least=2
    )
    blocks: int | None = option(None, "number g of blocks, instead of their side", least=1)
    share: bool = option(False, "one rotation for all slices of a weight")
    series: bool = option(False, "five terms of a series instead of the inverse (OFTv2)")
    eps: float | None = option(None, "constrained OFT: bound of ||Q||_F over the slices (published: 6e-5)", least=0)
    dropout: float = option(0.0, "share of the slices left as they are in a training step", least=0, most=0.99)

    def tuner(self, site: Site) -> Tuner:
        linear = site.place.kind in ("linear", "conv1d")
        if self.dropout and not linear:
            raise UserError(f"oft: dropout leaves inputs as they are, and {site.place.path!r} is no linear layer")
        return (LinearOFTTuner if linear else OFTTuner)(site, self)

    def procedure(self, delta: Any) -> Procedure | None:
        return None if self.eps is None else Projection(delta, self)
