"""ID3: unmask a few more entries of the weights at every step, until a budget is used up on the last one.

Paper: Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models, Agarwal et al., 2024,
arXiv:2408.14470.

Formula: H(w) = |g| / (|w| + eps)^exp of every entry w that is masked yet, with its gradient g at this step; the u_t
largest H over all tensors together are unmasked for good and take part in the update of step t; w' = w + v.
Schedule: u_t = B // T, one more in the first B % T of the T steps.
Count: B = floor(keep * N) of the N backbone parameters, tied ones counted once and the head left out.
Departure: the published code masks dense gradients under dense moments, where weight decay moves what is masked; here
the B values are one tensor, of which step t opens u_t, so that the optimizer's state is 2 B numbers (with one step
count for all, as published: the first update of a late entry is larger), and begin() opens u_0 with its first batch.
"""

from typing import Any

import torch
from torch import Tensor

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.history import History
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import backbone
from deltaworks.methods.selective.growing import Growing, PooledTuner


class ID3Procedure(Growing):
    """The schedule and the score."""

    def __init__(self, delta: Delta, config: "ID3") -> None:
        super().__init__(delta, config)
        self.step, self.steps = 0, 0
        self.history = History()  # of the open entries of each tensor

    def due(self) -> int:
        """u_0 + ... + u_t."""
        return min(
            (self.step + 1) * (self.count // self.steps) + min(self.step + 1, self.count % self.steps), self.count
        )

    def scores(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """H of each entry."""
        return gradient.float().abs().flatten() / (weight.float().abs().flatten() + self.config.eps) ** self.config.exp

    def begin(self, run: Run) -> None:
        self.steps, values = run.steps, self.pool.values
        if values is None:
            return  # a finished adapter
        batch = next(iter(run.batches), None)
        if not self.count or not self.steps or run.loss is None or batch is None:
            raise UserError("id3 needs keep above 0 and Run(steps=..., batches=..., loss=...) in procedure.begin")
        self.pool.open = len(self.positions) < self.count
        self.spread()
        values.register_post_accumulate_grad_hook(lambda _: self.choose_next())
        if not len(self.positions):
            run.loss(self.delta.model, batch).backward()
            self.open_waiting()
            for parameter in self.delta.parameters():
                parameter.grad = None
        self.delta.reshaped()

    def stepped(self) -> None:
        if self.pool.values is None:
            return
        if len(self.waiting):
            self.open_waiting()
        self.step += 1
        if self.history.due(self.step, self.steps):
            self.history.note(self.step, self.kept())

    def end(self) -> None:
        self.pool.open = False
        self.pool.gradients.clear()

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "positions": self.positions, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        positions = state["positions"]
        inside = positions.dim() == 1 and bool(((positions >= 0) & (positions < sum(self.sizes))).all())
        if not inside or len(positions.unique()) != len(positions) or len(positions) > self.count:
            raise UserError(f"id3 can open {self.count} different entries, not the ones that the checkpoint names")
        self.step, self.history = state["step"], History(state["history"])
        self.positions = positions.to(self.positions.device, torch.long, copy=True)
        self.spread()

    def details(self) -> dict[str, Any]:
        return {"id3_kept": len(self.positions), "id3_entries": self.history.data}


@method(
    "id3",
    family="selective",
    paper="Agarwal et al., 2024, arXiv:2408.14470",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=PooledTuner,
    learning_rate=3e-4,
    tried=(3e-4, 1e-3, 3e-3),
    limits={
        "compile": "the entries of each adapter are others, so that switching compiles again",
        "sharded": "it chooses among all weights of the base in every backward pass",
    },
    small={"keep": 0.05},
)
class ID3(Config):
    targets: str = option("all", "which weights compete, never the output head's own")
    keep: float = option(0.0017, "fraction of the backbone's parameters that is trained in the end", least=0, most=1)
    exp: float = option(1.0, "exponent of the weight's size: 0 is the gradient alone, above it small weights win")
    eps: float = option(0.1, "what is added to the weight's size", least=1e-8)

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def tuner(self, site: Site) -> Tuner:
        return PooledTuner(site)

    def procedure(self, delta: Delta) -> Procedure:
        return ID3Procedure(delta, self)
