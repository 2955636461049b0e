"""Transformed LoRA (TLoRA): a compressed transform of the weight's inputs, and a compressed rest.

Paper: Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models, Tao et
al., 2025, arXiv:2501.08727 (ICCV). Known from notes on the paper; the published code could not be read.

Formula: W' = W T + D, with in = I_1 ... I_K, out = J_1 ... J_K (row-major).
T[(i), (j)] = trace(A^1[i_1, j_1] ... A^K[i_K, j_K]), A^k [I_k, I_k, R, R] (a tensor-ring matrix);
D[(j), (i)] = trace(B^1[i_1] ... B^K[i_K] C^1[j_1] ... C^K[j_K]), B^k [I_k, Q, Q], C^k [J_k, Q, Q] (a tensor ring).
Start: A^k[:, :, r, r'] = I / R, which makes T the identity, and B^1 = 0.
Penalties: R_I = sum_k ||A^k - A^k_start||_F^2; R_O = sum_k ||M^T M - I||_F^2 with M = A^k as [R R I_k, I_k].
Count: R^2 sum I_k^2 + Q^2 (sum I_k + sum J_k) for each weight (320 = 16 x 20, R = 2, Q = 4: 3,776); with
residual=lora, D = B A of rank Q: Q (in + out) instead of the second term.
Departure: none known; which modes, spreads and unfolded matrices the paper takes is read into it, and sizes without
balanced factors are padded, T and D cut to size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.forms import Tuner
from deltaworks.core.lean.remaking import again
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.tensor.tensors import padded_split, ring_matrix, ring_open, ring_product


class TransformTuner(Tuner):
    """Cores ``T`` of the transform, ``B`` and ``C`` of the rest (or the factors B [Q, in], C [out, Q] of it)."""

    adds = False
    decays = False  # weight decay would pull T to zero, not to the identity

    def __init__(self, site: Site, config: "TransformedLoRA") -> None:
        super().__init__()
        (self.out, self.inner), Q = site.shape, config.residual_rank
        outs, ins = (padded_split(size, config.modes) for size in site.shape)
        self.rank = config.transform_rank
        self.T = nn.ParameterList(self.start(site.zeros(size, size, self.rank, self.rank)) for size in ins)
        if config.residual == "lora":
            site.check_rank(Q)
            self.B, self.C = (
                nn.ParameterList([site.kaiming(Q, self.inner)]),
                nn.ParameterList([site.zeros(self.out, Q)]),
            )
        else:  # spread sqrt(n_out) / n_in of a core as a matrix: B^k [I_k Q, Q], C^k [Q, J_k Q]
            rest = (site.normal(size, Q, Q, std=Q**0.5 / (size * Q)) for size in ins[1:])
            self.B = nn.ParameterList([site.zeros(ins[0], Q, Q), *rest])
            self.C = nn.ParameterList(site.normal(size, Q, Q, std=(size * Q) ** 0.5 / Q) for size in outs)

    def start(self, core: Any) -> Any:
        """The core [I, I, R, R] filled with what makes T the identity: I / R for every pair of ring indices."""
        with torch.no_grad():
            core.diagonal(dim1=0, dim2=1).fill_(1 / self.rank)
        return core

    def residual(self) -> tuple[Tensor, Tensor]:
        """D as factors: [rank, in] and [out, rank], with rank Q^2 for the ring."""
        if self.B[0].dim() == 2:
            return self.B[0], self.C[0]
        down, up = ring_open(self.B), ring_open(self.C)
        return down.flatten(1)[: self.inner].T, up.mT.flatten(1)[: self.out]

    def weight(self, weight: Tensor) -> Tensor:
        T = ring_matrix(self.T)[: self.inner, : self.inner]
        down, up = self.residual()
        return weight @ T.to(weight.dtype) + (up @ down).to(weight.dtype)

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        down, up = self.residual()
        return base(again(self.turned, x)) + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def turned(self, x: Tensor) -> Tensor:
        """x T"""
        size = torch.Size(core.shape[0] for core in self.T).numel()
        padded = F.pad(x, (0, size - self.inner))
        return ring_product([core.to(x.dtype) for core in self.T], padded)[..., : self.inner]

    def penalties(self) -> tuple[Tensor, Tensor]:
        """R_I and R_O; both are zero at the start."""
        near = sum((core - self.start(torch.zeros_like(core))).square().sum() for core in self.T)
        matrices = [core.permute(2, 3, 0, 1).flatten(0, 2) for core in self.T]
        right = sum((M.T @ M - torch.eye(M.shape[1], device=M.device)).square().sum() for M in matrices)
        return near, right  # type: ignore[return-value]  # sums of at least two tensors


class PenaltyProcedure(Procedure):
    """Adds ``identity * R_I + orthogonal * R_O`` of every weight to the loss."""

    def __init__(self, delta: Any, config: "TransformedLoRA") -> None:
        super().__init__(delta)
        self.config = config
        self.tuners: dict[str, Any] = {item.key: item.tuner for item in delta.attached if item.tuner.config is config}

    def loss(self, loss: Tensor) -> Tensor:
        for tuner in self.tuners.values():
            near, right = tuner.penalties()
            loss = loss + (self.config.identity_penalty * near + self.config.orthogonal_penalty * right).to(loss.device)
        return loss

    @torch.no_grad()
    def details(self) -> dict[str, Any]:
        found = {key: [float(value) for value in tuner.penalties()] for key, tuner in self.tuners.items()}
        names = ("transformed_lora_R_I", "transformed_lora_R_O")
        return {name: {key: both[i] for key, both in found.items()} for i, name in enumerate(names)}


@method(
    "transformed-lora",
    family="reparametrized/tensor",
    paper="Tao et al., 2025, arXiv:2501.08727",
    kinds=("linear", "conv1d"),
    tuner=TransformTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class TransformedLoRA(Config):
    targets: str = option("linear", "the paper: projections of the attention")
    transform_rank: int = option(2, "R, the ring rank of the transform T; the paper: 1 to 8", least=1)
    residual_rank: int = option(4, "Q, the ring rank (or rank) of the rest D", least=1)
    modes: int = option(3, "K, into how many factors a size is split", least=2, most=6)
    residual: str = option("ring", "D as a tensor ring or a product (the paper's stars)", choices=("ring", "lora"))
    identity_penalty: float = option(0.0, "weight of R_I, which keeps T near the identity", least=0)
    orthogonal_penalty: float = option(0.0, "weight of R_O, which keeps T near orthogonal", least=0)

    def procedure(self, delta: Any) -> Procedure | None:
        return PenaltyProcedure(delta, self) if self.identity_penalty or self.orthogonal_penalty else None
