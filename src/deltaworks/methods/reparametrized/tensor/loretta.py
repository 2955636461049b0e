"""LoRETTA: bottleneck adapters (adp) and LoRA (rep) whose two matrices are tensor trains.

Paper: LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large Language
Models, Yang et al., 2024, arXiv:2402.11417 (NAACL).

Formula: a matrix M [n_in, n_out], read row-major as a tensor k_1 x ... x k_D, is M[i_1 ... i_D] = G_1[:, i_1, :] ...
G_D[:, i_D, :] with cores G_i [R_{i-1}, k_i, R_i], R_0 = R_D = 1, the other ranks R.
adp: z + U f(D z + b_D) + b_U with D [d, b], U [b, d] such matrices; z is the output of a layer that writes to the
residual stream, and the input of one that reads from it. rep: W' = W + s (M_A M_B)^T, M_A [in, r], M_B [r, out],
s = alpha / r.
Count: P = sum of R_{i-1} k_i R_i for a matrix (768 x 64, R = 5: 780); adp 2 P + b + d (2,392), rep P_A + P_B.
Departure: the last core of U and of M_B, and b_U, start at zero, so that step 0 is the base; the published code starts
them at random (init=random) and trains the norms too (also="norm" does).
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.tensor.tensors import train, train_entries

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": F.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda x: x,
}
READERS = ("q", "k", "v", "gate", "up")
"""Roles of the layers that read from the residual stream."""


class AdpTuner(Tuner):
    """Cores of D [d, b] and U [b, d], b_D [b], b_U [d], before or behind a layer."""

    def __init__(self, site: Site, config: "LoRETTAAdp") -> None:
        super().__init__()
        out, inner = site.shape
        self.before = site.place.role.rpartition(".")[2] in READERS
        self.features, self.width = inner if self.before else out, config.width
        zero = config.init == "zero"
        self.D = train(site, self.features, self.width, config.tensor_rank, zero=False)
        self.U = train(site, self.width, self.features, config.tensor_rank, zero=zero)
        self.b_D = site.kaiming(self.width)
        self.b_U = site.zeros(self.features) if zero else site.kaiming(self.features)
        self.activation = ACTIVATIONS[config.activation]

    def adapted(self, z: Tensor) -> Tensor:
        """``z + U f(D z + b_D) + b_U`` for z [..., d]."""
        D, U = (train_entries(cores).to(z.dtype) for cores in (self.D, self.U))
        inner = self.activation(F.linear(z, D.view(self.features, self.width).T, self.b_D.to(z.dtype)))
        return z + F.linear(inner, U.view(self.width, self.features).T, self.b_U.to(z.dtype))

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        return base(self.adapted(x)) if self.before else self.adapted(base(x))


class RepTuner(Tuner):
    """Cores of M_A [in, r] and M_B [r, out]."""

    def __init__(self, site: Site, config: "LoRETTARep") -> None:
        super().__init__()
        site.check_rank(config.rank)
        (self.out, self.inner), self.rank = site.shape, config.rank
        self.A = train(site, self.inner, self.rank, config.tensor_rank, zero=False)
        self.B = train(site, self.rank, self.out, config.tensor_rank, zero=config.init == "zero")
        self.scale = config.alpha / self.rank  # type: ignore[operator]
        self.dropout = config.dropout

    def factors(self) -> Factors:
        A = train_entries(self.A).view(self.inner, self.rank).T
        return Factors(A, train_entries(self.B).view(self.rank, self.out).T, self.scale)


INIT = "zero: the last core of the second matrix is 0; random: the published code's, not the base at step 0"


@method(
    "loretta-adp",
    family="additive/adapters",
    paper="Yang et al., 2024, arXiv:2402.11417",
    kinds=("linear", "conv1d"),
    tuner=AdpTuner,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
    small={"width": 8},
)
class LoRETTAAdp(Config):
    targets: str = option("attention.o,mlp.down", "the paper: these for BERT; mlp.gate,mlp.up,mlp.down for LLaMA, OPT")
    width: int = option(64, "bottleneck b", least=1)
    tensor_rank: int = option(5, "rank R of the tensor trains; the paper: 2 to 32", least=1)
    activation: str = option("relu", "the non-linearity f", choices=ACTIVATIONS)
    init: str = option("zero", INIT, choices=("zero", "random"))


@method(
    "loretta-rep",
    family="reparametrized/tensor",
    paper="Yang et al., 2024, arXiv:2402.11417",
    kinds=("linear", "conv1d", "conv2d"),
    tuner=RepTuner,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
)
class LoRETTARep(Config):
    targets: str = option("linear", "the paper: attention.q,attention.v")
    rank: int = option(8, "rank r of the change", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank; the paper: twice the rank", least=0)
    tensor_rank: int = option(5, "rank R of the tensor trains; the paper: 2 to 32", least=1)
    dropout: float = option(0.0, "dropout on the input; the paper: 0.05", least=0, most=0.99)
    init: str = option("zero", INIT, choices=("zero", "random"))
