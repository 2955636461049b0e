"""LoRA and its close variants: a low-rank product beside the frozen weight.

Paper: LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685. Options: rsLoRA
(Kalajdzievski, arXiv:2312.03732), DoRA (Liu et al., arXiv:2402.09353), PiSSA (Meng et al., arXiv:2404.02948),
LoRA+ (Hayou et al., arXiv:2402.12354).

Formula: W' = W + s B A, with A [r, in], B [out, r], s = alpha / r (rsLoRA: alpha / sqrt(r)).
DoRA: W' = m * (W + s B A) / ||W + s B A|| by rows, m [out], the norm detached from the graph.
PiSSA: W' = W + s (B A - B0 A0) with B0 A0 / s the best rank-r approximation of W; so the base stays as it is.
Count: sum of r (in + out); DoRA adds out for each weight.
Departure: the published PiSSA overwrites the base weight; here it is the rank-2r change that equals it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.lean.linear import scaled
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


@dataclass(kw_only=True)
class LowRank(Config):
    """The options of every method whose change is ``s B A``."""

    targets: str = option("linear", "the paper: attention.q,attention.v; all linears are better at equal budget")
    rank: int = option(8, "rank r of the change", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    dropout: float = option(0.0, "dropout on the input of A", least=0, most=0.99)
    rslora: bool = option(False, "s = alpha / sqrt(rank), for ranks of 32 and more")
    ratio: float = option(1.0, "learning rate of B over that of A (LoRA+: 16)", least=0)


class LoRATuner(Tuner):
    """The change ``s B A``."""

    def __init__(self, site: Site, config: LowRank) -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        if site.place.kind == "embedding":  # A = 0 and B random, as for one-hot inputs
            self.A, self.B = site.zeros(config.rank, inner), site.normal(out, config.rank)
        else:
            self.A, self.B = site.kaiming(config.rank, inner), site.zeros(out, config.rank)
        self.scale = config.alpha / config.rank ** (0.5 if config.rslora else 1.0)  # type: ignore[operator]
        self.dropout = config.dropout
        self.rates = {"B": config.ratio}

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.scale)


class PiSSATuner(LoRATuner):
    """Starts from the principal singular vectors and values of the weight (PiSSA, equations 2-5)."""

    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, config: LowRank) -> None:
        super().__init__(site, config)
        if not self.scale:
            raise UserError(f"{config.name}: the start divides by the scale, so alpha must be above 0")
        if site.device.type != "meta":
            U, S, V = torch.linalg.svd(site.matrix.detach().float(), full_matrices=False)
            root = (S[: config.rank] / self.scale).sqrt()
            self.A = nn.Parameter((root[:, None] * V[: config.rank]).contiguous())
            self.B = nn.Parameter((U[:, : config.rank] * root).contiguous())
        # made again from the base on loading: the product does not depend on the signs of the vectors
        self.register_buffer("A0", self.A.detach().clone(), persistent=False)
        self.register_buffer("B0", self.B.detach().clone(), persistent=False)

    def factors(self) -> Factors:
        return Factors(torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1), self.scale)


class DoRATuner(LoRATuner):
    """Magnitude and direction apart (DoRA, equation 5; the norm is a constant for the gradient, section 4.3)."""

    adds = False
    # not low-rank, so form 2: the product is one part of the new weight
    factors = Tuner.factors

    def __init__(self, site: Site, config: LowRank) -> None:
        super().__init__(site, config)
        matrix = site.matrix.detach()
        norm = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32)).float()
        self.magnitude = nn.Parameter(norm.clone())
        self.register_buffer("norm", norm, persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        moved = weight + (self.scale * (self.B @ self.A)).to(weight.dtype)
        norm = torch.linalg.vector_norm(moved.detach(), dim=1, dtype=torch.promote_types(moved.dtype, torch.float32))
        return moved * self.gain(norm).to(weight.dtype)[:, None]

    def gain(self, norm: Tensor) -> Tensor:
        """The magnitude over the norm [out]; 0 for a row of zeros."""
        return self.magnitude / norm.clamp(min=1e-12)


class LinearDoRATuner(DoRATuner):
    """The same where the operation is a matrix product: nothing of the size of the weight is formed."""

    norm: Tensor  # ||W|| by rows [out]

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():  # W A^T and the bias, through the operation itself: it may hold W in any format
            A = self.A.to(x.dtype)
            probe = base(torch.cat([A, A.new_zeros(1, A.shape[1])]))
        bias = probe[-1].clone()
        gain = self.gain(self._moved_norm(probe[:-1] - bias))
        return scaled(self, base, x, Factors(self.A, self.B, self.scale), gain, bias)

    def _moved_norm(self, product: Tensor) -> Tensor:
        """||W + s B A|| by rows [out], of ``product`` = A W^T [r, out]: the square multiplied out."""
        A, B = self.A.detach(), self.B.detach()
        cross = 2 * self.scale * (B * product.T.float()).sum(dim=1)
        own = self.scale**2 * ((B @ (A @ A.T)) * B).sum(dim=1)
        return (self.norm**2 + cross + own).clamp(min=0).sqrt()


@method(
    "lora",
    family="reparametrized/low-rank",
    paper="Hu et al., 2021, arXiv:2106.09685",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    learning_rate=1e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class LoRA(LowRank):
    dora: bool = option(False, "train magnitude and direction of the rows apart (DoRA)")
    pissa: bool = option(False, "start from the principal singular vectors of the weight (PiSSA)")

    def tuner(self, site: Site) -> Tuner:
        linear = site.place.kind in ("linear", "conv1d")
        if self.dora and (self.pissa or (self.dropout and not linear)):
            other = "pissa" if self.pissa else f"dropout at {site.place.path!r}, which is no linear layer"
            raise UserError(f"lora: dora does not go with {other}: choose one of them")
        if self.dora:
            return (LinearDoRATuner if linear else DoRATuner)(site, self)
        return (PiSSATuner if self.pissa else LoRATuner)(site, self)
