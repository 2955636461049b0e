"""KronA and LoKr: the weight change is a Kronecker product.

Papers: KronA, Edalati et al., 2022, arXiv:2212.10650; LoKr, Yeh et al., 2023 (LyCORIS), arXiv:2309.14859.

Formula: W' = W + s (A (x) B), with A [a1, a2], B [b1, b2], a1 b1 = out, a2 b2 = in. On inputs, with x read row-major
as X [a2, b2]: (A (x) B) x = A X B^T, read row-major; the change itself is never formed.
LoKr: a1, a2 are the largest divisors of out and in up to their roots, or up to ``factor``; B (and A, if ``both``) is
a product of rank r where r < max(side) / 2; s = alpha / r, or 1 where no factor is low-rank.
Count: a1 a2 + b1 b2 for each weight (at best 2 sqrt(out in)); LoKr: a1 a2 + r (b1 + b2).
Departure: KronA has no published code; that B is the factor that starts at 0 is our choice (LyCORIS does the same).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.lean.remaking import again
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.core.weights import base_tensors


def kronecker(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``(A (x) B) x`` for x [..., a2 b2] -> [..., a1 b1], in the cheaper of its two orders."""
    (a1, a2), (b1, b2) = A.shape, B.shape
    X = x.unflatten(-1, (a2, b2))
    if a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1):
        return (A @ F.linear(X, B)).flatten(-2)
    return F.linear(A @ X, B).flatten(-2)


def divisors(size: int) -> list[int]:
    return [number for number in range(1, size + 1) if size % number == 0]


@functools.cache
def balanced(out: int, inner: int) -> tuple[int, int]:
    """The shape of A with the fewest parameters in A and B, and among these the squarest factors."""
    shapes = itertools.product(reversed(divisors(out)), divisors(inner))
    count = {(a1, a2): a1 * a2 + out * inner // (a1 * a2) for a1, a2 in shapes}
    return min(count, key=lambda a: (count[a], abs(math.log(a[0] ** 2 / out)) + abs(math.log(a[1] ** 2 / inner))))


class WeightTuner(Tuner):
    """Factors A [a1, a2] and B [b1, b2], each a matrix or a product [., r] [r, .]; the last matrix of B starts at 0."""

    def __init__(self, site: Site, A: tuple[int, ...], B: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.A = nn.ParameterList(site.kaiming(*shape) for shape in itertools.pairwise(A))
        *random, last = itertools.pairwise(B)
        self.B = nn.ParameterList([*(site.kaiming(*shape) for shape in random), site.zeros(*last)])
        self.scale = scale

    def pair(self) -> tuple[Tensor, Tensor]:
        return functools.reduce(torch.matmul, self.A), functools.reduce(torch.matmul, self.B)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * torch.kron(*self.pair())).to(weight.dtype)


class KroneckerTuner(WeightTuner):
    """The same where the operation is a matrix product: nothing of the size of the weight is formed."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        return base(x) + again(self.change, x)

    def change(self, x: Tensor) -> Tensor:
        A, B = self.pair()
        return kronecker(x, A.to(x.dtype), (self.scale * B).to(x.dtype))


TUNERS: dict[str, type[WeightTuner]] = dict.fromkeys(("linear", "conv1d"), KroneckerTuner)
TUNERS |= dict.fromkeys(("conv2d", "embedding", "matrix"), WeightTuner)


@method(
    "krona",
    family="reparametrized/kronecker",
    paper="Edalati et al., 2022, arXiv:2212.10650",
    kinds=tuple(TUNERS),
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class KronA(Config):
    targets: str = option("linear", "the paper: attention.q,attention.v")
    a1: int | None = option(None, "rows of A, a divisor of out; default: fewest parameters, squarest factors", least=1)
    a2: int | None = option(None, "columns of A, a divisor of in", least=1)
    scale: float = option(1.0, "s, tuned together with the learning rate", least=0)

    def tuner(self, site: Site) -> Tuner:
        out, inner = site.shape
        best = balanced(out, inner)
        a1, a2 = self.a1 or best[0], self.a2 or best[1]
        if out % a1 or inner % a2:
            raise UserError(f"krona: a1={a1}, a2={a2} do not divide the sizes of {site.place.path!r} ({out} x {inner})")
        return TUNERS[site.place.kind](site, (a1, a2), (out // a1, inner // a2), self.scale)


@method(
    "lokr",
    family="reparametrized/kronecker",
    paper="Yeh et al., 2023, arXiv:2309.14859",
    kinds=tuple(TUNERS),
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
)
class LoKr(Config):
    targets: str = option("linear", "every linear layer inside the blocks")
    rank: int = option(8, "rank r of a decomposed factor", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    factor: int | None = option(None, "largest side of A; default: the roots of the weight's sizes", least=1)
    both: bool = option(False, "decompose A too where the rank allows it")

    def tuner(self, site: Site) -> Tuner:
        out, inner = site.shape
        weight = base_tensors(site.module)[site.place.parameter]
        channels = weight.shape[1] if site.place.kind == "conv2d" else inner  # the kernel lies in B
        a1, a2 = (max(d for d in divisors(n) if d * d <= n and d <= (self.factor or n)) for n in (out, channels))
        low = self.rank < max(out // a1, channels // a2) / 2, self.both and self.rank < max(a1, a2) / 2
        B = (out // a1, self.rank, inner // a2) if low[0] else (out // a1, inner // a2)
        A = (a1, self.rank, a2) if low[1] else (a1, a2)
        scale = self.alpha / self.rank if any(low) else 1.0  # type: ignore[operator]
        return TUNERS[site.place.kind](site, A, B, scale)
