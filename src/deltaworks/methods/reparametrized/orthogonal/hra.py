"""HRA: the inputs of a weight pass through a chain of reflections.

Paper: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, Yuan et al.,
2024, arXiv:2405.17484 (NeurIPS).

Formula: W' = W H_1 .. H_r, H_i = I - 2 u_i u_i^T / ||u_i||^2, U = (u_1 .. u_r) [in, r]. With U of unit columns
H_1 .. H_r = I - U T U^T, T [r, r] upper triangular with T^-1 = I / 2 + the part of U^T U above its diagonal; so x
takes one rank-r step, not r, and W' - W has rank r. Start: u_1 = u_2, u_3 = u_4 .., whose reflections cancel.
Penalty: the loss gains lambda times the sum over the weights of ||I - U^T U||_F^2, U of unit columns; at infinity, or
``gram_schmidt``, the u are orthogonal and T = 2 I.
Count: r in for each weight.
Departure: the published layer multiplies the reflections out to an [in, in] matrix in every forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class HRATuner(Tuner):
    """``u`` [in, r], the directions of the reflections; their lengths do not count."""

    decays = False

    def __init__(self, site: Site, config: "HRA") -> None:
        super().__init__()
        inner, rank = site.shape[1], config.rank
        if rank > inner:
            raise UserError(
                f"rank {rank} is larger than the {inner} inputs of {site.place.path!r}: use at most {inner}"
            )
        self.orthogonal = config.gram_schmidt
        start = site.kaiming(inner, rank if self.orthogonal else rank // 2)
        self.u = start if self.orthogonal else nn.Parameter(start.detach().repeat_interleave(2, dim=1))

    def unit(self) -> Tensor:
        """U [in, r] with columns of length 1."""
        return nn.functional.normalize(self.u, dim=0)

    def reflected(self) -> tuple[Tensor, Tensor]:
        """U [in, r] and K = T^T U^T [r, in], so that the row x becomes x - (x U) K."""
        if self.orthogonal:
            U = torch.linalg.qr(self.u)[0]
            return U, 2 * U.T
        U = self.unit()
        eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        return U, torch.linalg.solve_triangular(eye / 2 + (U.T @ U).triu(1).T, U.T, upper=False)

    def weight(self, weight: Tensor) -> Tensor:
        U, K = self.reflected()
        # W H = W - W U T U^T
        return weight - (weight @ K.T.to(weight.dtype)) @ U.T.to(weight.dtype)


class LinearHRATuner(HRATuner):
    """The same where the operation is a matrix product: the input is reflected, and the weight never touched."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        U, K = (factor.to(x.dtype) for factor in self.reflected())
        return base(x - (x @ U) @ K)


class Orthogonality(Procedure):
    """Keeps the reflections apart from each other."""

    def __init__(self, delta: Any, config: "HRA") -> None:
        super().__init__(delta)
        self.config = config

    def loss(self, loss: Tensor) -> Tensor:
        tuners: list[Any] = [tuner for tuner in self.delta.tuners() if tuner.config is self.config]
        penalty = sum(closeness(tuner.unit()).to(loss.device) for tuner in tuners)
        return loss + self.config.penalty * penalty

    def details(self) -> dict[str, Any]:
        own: list[Any] = [item for item in self.delta.attached if item.tuner.config is self.config]
        return {"hra_overlap": {item.key: float(closeness(item.tuner.unit().detach())) for item in own}}


def closeness(U: Tensor) -> Tensor:
    """||I - U^T U||_F^2."""
    return (torch.eye(U.shape[1], dtype=U.dtype, device=U.device) - U.T @ U).square().sum()


@method(
    "hra",
    family="reparametrized/orthogonal",
    paper="Yuan et al., 2024, arXiv:2405.17484",
    kinds=("linear", "conv1d", "conv2d"),
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class HRA(Config):
    targets: str = option("linear", "the paper: attention and feed-forward layers")
    rank: int = option(8, "number r of reflections, even unless they start apart", least=1)
    penalty: float = option(0.0, "lambda, weight of the orthogonality loss of each weight", least=0)
    gram_schmidt: bool = option(False, "orthogonal reflections from a random start, so not the base at step 0")

    def tuner(self, site: Site) -> Tuner:
        if self.rank % 2 and not self.gram_schmidt:
            raise UserError(
                f"hra: rank {self.rank} is odd, so a reflection would have no twin to cancel it: use an even one"
            )
        if self.penalty and self.gram_schmidt:
            raise UserError("hra: with gram_schmidt the reflections are orthogonal already: leave penalty out")
        return (LinearHRATuner if site.place.kind in ("linear", "conv1d") else HRATuner)(site, self)

    def procedure(self, delta: Any) -> Procedure | None:
        return Orthogonality(delta, self) if self.penalty else None
