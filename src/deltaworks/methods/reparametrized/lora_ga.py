"""LoRA-GA: LoRA that starts along the gradient of full fine-tuning.

Paper: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, Wang et al., 2024, arXiv:2407.05000 (NeurIPS).

Formula: W' = W + s (B A - B0 A0), A [r, in], B [out, r]. With G = U S V^T the gradient of the weight, averaged over
a few batches before the first step, A0 = c V_{1..r}^T and B0 = c U_{r+1..2r}, c = out^(1/4) / sqrt(gamma).
Count: r (in + out) for each weight; stored are as many values again, in bfloat16, as A0 and B0 cannot be made again.
Departure: the published code writes W - s B0 A0 over the base; here the base stays, and A0, B0 are kept beside A and B.
The start is rounded to bfloat16, so that they take half the room.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.calibration import summed_gradients
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import method, option
from deltaworks.core.sites import Site, stable_hash
from deltaworks.core.weights import base_tensors, matrix_of
from deltaworks.methods.reparametrized.lora import LoRATuner, LowRank


class LoRAGATuner(LoRATuner):
    """LoRA's A and B, and what they started from: ``A0`` [r, in] and ``B0`` [out, r], None before the gradient."""

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, site: Site, config: "LoRAGA") -> None:
        super().__init__(site, config)
        if 2 * config.rank > min(site.shape):
            raise UserError(
                f"lora-ga takes {2 * config.rank} singular vectors for rank {config.rank}, and {site.place.path!r} "
                f"({site.shape[0]} x {site.shape[1]}) has {min(site.shape)}: use a smaller rank, or other targets"
            )
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    def factors(self) -> Factors:
        if self.A0 is None or self.B0 is None:
            return Factors(self.A, self.B, self.scale)
        return Factors(torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1), self.scale)

    @torch.no_grad()
    def start(self, gradient: Tensor, directions: str, gamma: float) -> float:
        """Point A and B along ``gradient`` [out, in]; returns the share of its squared norm in their directions."""
        rank = len(self.A)
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)  # V [in, q]
        first, second = slice(rank), slice(rank, 2 * rank)
        turns = slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
        a, b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": turns}[directions]
        size = len(gradient) ** 0.25 / gamma**0.5
        self.A0, self.B0 = (size * V[:, a].T).bfloat16(), (size * U[:, b]).bfloat16()
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)
        return float(S[: 2 * rank].square().sum() / gradient.square().sum().clamp(min=1e-30))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if {"A0", "B0"} <= tensors.keys():
            self.A0, self.B0 = (torch.empty_like(x, dtype=torch.bfloat16) for x in (self.A, self.B))
        super().restore(tensors)


class GradientStart(Procedure):
    """The gradient of every tuned weight, before the first step."""

    def __init__(self, delta: Any, config: "LoRAGA") -> None:
        super().__init__(delta)
        self.config = config
        self.items = [item for item in delta.attached if item.tuner.config is config]
        self.shares: dict[str, float] = {}

    @property
    def started(self) -> bool:
        return all(item.tuner.A0 is not None for item in self.items)

    def begin(self, run: Run) -> None:
        if self.started:
            return  # loaded with its start
        places, model = [item.place for item in self.items], self.delta.model
        weights = [base_tensors(model.get_submodule(place.path))[place.parameter] for place in places]
        unique = list({id(weight): weight for weight in weights}.values())  # parts and experts share theirs
        sums, seen = summed_gradients(self.delta.model, unique, run, self.config.batches)
        gradients = {id(weight): total / seen for weight, total in zip(unique, sums, strict=True)}
        with torch.random.fork_rng():
            torch.manual_seed(stable_hash(f"{self.delta.seed}/lora-ga"))
            for item, weight in zip(self.items, weights, strict=True):
                matrix = matrix_of(item.place, gradients[id(weight)])
                self.shares[item.key] = item.tuner.start(matrix, self.config.directions, self.config.gamma)
        self.delta.reshaped()

    def loss(self, loss: Tensor) -> Tensor:
        if not self.started:
            raise UserError("lora-ga has no gradient to start from: call procedure.begin(run) before the first step")
        return loss

    def state(self) -> dict[str, Any]:
        return {"shares": self.shares}

    def resume(self, state: dict[str, Any]) -> None:
        self.shares = dict(state["shares"])

    def details(self) -> dict[str, Any]:
        return {"lora_ga_gradient_share": self.shares}


@method(
    "lora-ga",
    family="reparametrized/low-rank",
    paper="Wang et al., 2024, arXiv:2407.05000",
    kinds=("linear", "conv1d", "conv2d"),
    tuner=LoRAGATuner,
    learning_rate=1e-3,
    tried=(3e-4, 1e-3, 3e-3),
    small={"rank": 4},
)
class LoRAGA(LowRank):
    directions: str = option("ArB2r", "which singular vectors A and B take", choices=("ArB2r", "A2rBr", "ArBr"))
    gamma: float = option(16.0, "the larger, the smaller A and B start", least=1e-6)
    batches: int = option(8, "batches whose gradients are averaged", least=1)

    def procedure(self, delta: Any) -> Procedure:
        return GradientStart(delta, self)
