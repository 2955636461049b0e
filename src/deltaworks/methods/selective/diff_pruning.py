"""Diff pruning: learn a sparse change of all weights under a relaxed L0 penalty, cut it to a few entries, go on.

Paper: Parameter-Efficient Transfer Learning with Diff Pruning, Guo et al., 2020, arXiv:2012.07463 (ACL 2021).

Formula: W' = W + z_g z w for every parameter, w trained from 0, and hard-concrete gates, one for each entry (z) and
one for each tensor (z_g): s = sigmoid(log u - log(1 - u) + a), u uniform, z = min(1, max(0, 3 s - 1.5)); without u in
evaluation. The loss gains lambda times the expected number of changed entries, sum sigmoid(a_g) sigmoid(a). After the
first stage the k = floor(keep N) largest |z_g z w| stay, and their w alone is trained.
Count: 2 N and one for each tensor in training; k afterwards (BERT-large at 0.5 %: 1,675,709), each stored with
its position, 5 to 6 bytes.
Departure: the noise u is a function of seed and step instead of one draw after another, so that recomputed blocks and
resumed runs see the same; the fixed mask is the gates themselves, saturated, which no gradient can reach.
"""

from typing import Any

import torch
from torch import Tensor

from deltaworks.core.anatomy import backbone
from deltaworks.core.delta import Delta
from deltaworks.core.lean.remaking import again
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.methods.selective.concrete import SATURATED, GatedTuner
from deltaworks.methods.selective.entries import Choosing, largest


class DiffProcedure(Choosing):
    """The penalty of the first stage and the cut after it."""

    step, turn = 0, 0

    def begin(self, run: Run) -> None:
        self.turn = max(1, round(self.config.first * run.steps))

    def each(self) -> list[tuple[GatedTuner, str]]:
        return [(tuner, name) for tuner in self.tuners() for name in tuner.first if name in tuner.changes]

    def loss(self, loss: Tensor) -> Tensor:
        if self.step >= self.turn or not self.each():
            return loss
        return loss + self.config.penalty * again(lambda: self.expected(loss.device))

    def expected(self, device: torch.device) -> Tensor:
        """The expected number of changed entries of all tensors."""
        return torch.stack([tuner.expected(name).to(device) for tuner, name in self.each()]).sum()

    def stepped(self) -> None:
        self.step += 1
        for tuner in self.tuners():
            tuner.draw.fill_(self.step)
        if self.step == self.turn:
            self.cut()

    def end(self) -> None:
        if self.step < self.turn:
            self.cut()

    @torch.no_grad()
    def cut(self) -> None:
        """Keep the k largest changes of all tensors together; the optimizer starts again."""
        if not (each := self.each()):
            return  # loaded: cut already
        changes = [tuner.change(name) for tuner, name in each]
        scores = torch.cat([change.abs().flatten().to(self.tuners()[0].device) for change in changes])
        kept = torch.zeros_like(scores).index_fill(0, largest(scores, self.count), 1.0)
        for (tuner, name), change, part in zip(each, changes, kept.split([c.numel() for c in changes]), strict=True):
            mask = part.view_as(change).to(change.device)
            tuner.changes[name].copy_(change * mask)
            tuner.logits[name].copy_((2 * mask - 1) * SATURATED)
            if name in tuner.groups:
                tuner.groups[name].fill_(SATURATED)
        self.restart(self.delta.parameters())

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def resume(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for tuner in self.tuners():
            tuner.draw.fill_(self.step)

    def kept(self) -> dict[str, int]:
        """How many entries of which tensor are changed."""
        return {
            f"{item.key}.{name}".replace("chosen.", "").removesuffix(".values"): entries.numel()
            for item in self.delta.attached
            if item.tuner.config is self.config
            for name, entries in item.tuner.stored().items()
            if name.endswith(".values")
        }


@method(
    "diff-pruning",
    family="selective",
    paper="Guo et al., 2020, arXiv:2012.07463",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=GatedTuner,
    learning_rate=1e-4,
    tried=(1e-4, 3e-4, 1e-3),
    small={"keep": 0.05},
)
class DiffPruning(Config):
    targets: str = option("all", "which weights may change, never the output head's own; the paper: all")
    keep: float = option(0.005, "rho: fraction of the entries that are changed in the end", least=0, most=1)
    penalty: float = option(1.25e-7, "lambda, the weight of the expected number of changed entries", least=0)
    mask_rate: float = option(2000.0, "learning rate of the gates, as a multiple of the run's (0.1 at 5e-5)", least=0)
    structured: bool = option(True, "a gate for each tensor besides those of its entries")
    first: float = option(0.5, "the first stage, as a share of the steps", least=0, most=1)

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def procedure(self, delta: Delta) -> Procedure:
        return DiffProcedure(delta, self)
