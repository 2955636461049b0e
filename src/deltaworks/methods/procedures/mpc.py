"""MPC: an extra loss on top of LoRA and what is built like it, that holds the low-rank matrices to a pattern.

Paper: See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of Decomposition, Si, Yang and Shen,
2024, arXiv:2407.05417.

Formula: with W' = W + s B A, A [r, in], B [out, r], the loss gains w times the mean over the weights of
  o (orthonormal): ||A A^T - I||_F^2 + ||B^T B - I||_F^2;
  d (orthogonal):  ||A A^T - I||_F^2 + ||B^T B - diag(B^T B)||_F^2, which leaves the lengths of B's columns free.
With G between the two (AdaLoRA's diag(L)) the same: P is B and Q is A.
Count: that of the method below.
Departure: the published code has the line for LoRA commented out and takes the mean of the norms without their squares,
for which its w = 0.1 to 0.3 was tuned (``squared=false``); here they are squared, as in the paper.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import OnTop, method, option

NAMES = (("A", "B"), ("Q", "P"))
"""What tuners call their low-rank matrices [r, in] and [out, r]."""


def distance(A: Tensor, B: Tensor, pattern: str, squared: bool = True) -> Tensor:
    """How far A [r, in] and B [out, r] are from the pattern "o" or "d": the sum of squares, or the mean norm."""
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    gram = B.T @ B
    wanted = eye if pattern == "o" else gram.diag().diag()
    norms = torch.stack([torch.linalg.matrix_norm(A @ A.T - eye), torch.linalg.matrix_norm(gram - wanted)])
    return norms.square().sum() if squared else norms.mean()


class Constraint(Procedure):
    """Adds the mean distance of every trained A and B from their pattern."""

    def __init__(self, delta: Any, config: "MPC") -> None:
        super().__init__(delta)
        self.config = config
        if not self.pairs():
            raise UserError(
                f"mpc constrains the A and B of low-rank changes, and {delta.config} trains none: "
                "write it behind a method that does, as in 'lora+mpc'"
            )

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A [r, in] and B [out, r] of every weight that trains both, by its name; those that weights share once."""
        found: dict[tuple[int, int], tuple[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        for item in self.delta.attached:
            for names in NAMES:
                A, B = (getattr(item.tuner, name, None) for name in names)
                if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
                    found.setdefault((id(A), id(B)), (item.key, (A, B)))
        return dict(found.values())

    def distances(self, squared: bool) -> dict[str, Tensor]:
        return {key: distance(A, B, self.config.pattern, squared) for key, (A, B) in self.pairs().items()}

    def loss(self, loss: Tensor) -> Tensor:
        distances = [value.to(loss.device) for value in self.distances(self.config.squared).values()]
        return loss + self.config.weight * torch.stack(distances).mean()

    def details(self) -> dict[str, Any]:
        return {"mpc_distance": {key: float(value.detach()) for key, value in self.distances(squared=True).items()}}


@method(
    "mpc", family="procedures", paper="Si et al., 2024, arXiv:2407.05417", learning_rate=3e-3, tried=(1e-3, 3e-3, 1e-2)
)
class MPC(OnTop):
    pattern: str = option("o", "o: orthonormal, d: orthogonal", choices=("o", "d"))
    weight: float = option(0.1, "w of the penalty; the paper: 0.1, for RTE and STS-B 0.3", least=0)
    squared: bool = option(True, "squared norms, as in the paper; the published code has plain ones")

    def procedure(self, delta: Any) -> Procedure:
        return Constraint(delta, self)
