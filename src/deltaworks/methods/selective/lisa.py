"""LISA: full fine-tuning of a few blocks at a time, drawn anew every so many steps.

Paper: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, Pan et al., 2024,
arXiv:2403.17919 (NeurIPS).

Formula: W' = V, with V a float32 master [the shape of W] that starts at W. At steps t with t mod K = 0, gamma of the L
blocks are drawn with equal chances, without replacement; they train until the next draw and the others rest. What
stands outside the blocks (embeddings, last norm, head) trains always.
Count: every parameter, tied ones once; at any time gamma blocks and what stands outside (LLaMA-2-7B, gamma = 2:
666,914,816 of 6,738,415,616).
Departure: masters of the blocks that rest stay beside the frozen base, so that the result detaches as any adapter; the
published code keeps the optimizer's moments of all blocks, here those of blocks that come to rest are dropped.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.history import History
from deltaworks.core.layers import drawn, layers, rest
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class LisaProcedure(Procedure):
    """Which blocks train at a step depends on the adapter's seed and the step alone."""

    def __init__(self, delta: Delta, config: "Lisa") -> None:
        super().__init__(delta)
        if not delta.anatomy.blocks:
            raise UserError(f"lisa draws blocks, and {delta.anatomy.model} has none that repeat: use full")
        self.config, self.step = config, 0
        self.optimizer: Optimizer | None = None

    def draw(self, step: int) -> list[int]:
        """The blocks that train at ``step``, as positions among all."""
        count = len(layers(self.delta))
        if not count:
            return []
        if self.config.layers > count:
            raise UserError(f"lisa: layers={self.config.layers} are more than the {count} blocks that it trains")
        return drawn(torch.ones(count), self.config.layers, f"{self.delta.seed}/lisa/{step // self.config.period}")

    def begin(self, run: Run) -> None:
        self.change()

    def optimizing(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def change(self) -> None:
        """Let the blocks of this step train and the others rest, without moments."""
        found, chosen = layers(self.delta), self.draw(self.step)
        names = list(found)
        rest(self.delta, [tuner for name in names if names.index(name) not in chosen for tuner in found[name]])
        if self.optimizer is not None:
            for parameter in self.delta.resting:
                self.optimizer.state.pop(parameter, None)

    def stepped(self) -> None:
        self.step += 1
        if self.step % self.config.period == 0:
            self.change()

    def end(self) -> None:
        rest(self.delta, [])

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def resume(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.change()

    def details(self) -> dict[str, Any]:
        """How long each block trained, and which ones from a step on (1, the others 0): every draw, told again."""
        names, history = list(layers(self.delta)), History()
        trained = dict.fromkeys(names, 0)
        for start in range(0, self.step, self.config.period):
            chosen = [names[index] for index in self.draw(start)]
            history.note(start, {name: int(name in chosen) for name in names})
            for name in chosen:
                trained[name] += min(self.config.period, self.step - start)
        return {"lisa_trained_steps": trained, "lisa_blocks_in_training": history.data}


@method(
    "lisa",
    family="selective",
    paper="Pan et al., 2024, arXiv:2403.17919",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    learning_rate=1e-4,
    tried=(1e-4, 3e-4, 1e-3),
    small={"layers": 1},
)
class Lisa(Config):
    targets: str = option("all", "what is trained at all: in the blocks in turn, outside them always")
    layers: int = option(2, "gamma, the number of blocks that train at a time", least=1)
    period: int = option(20, "K, the steps between two draws", least=1)

    def tuner(self, site: Site) -> Tuner | None:
        return Replacement(site) if site.place.whole else None

    def procedure(self, delta: Delta) -> Procedure:
        return LisaProcedure(delta, self)
