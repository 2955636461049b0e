"""IST: at each step only a few layers of another method train, the likelier the more the loss needs them.

Paper: Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large
Language Models, Yao et al., 2024, arXiv:2410.11772 (EMNLP Findings). Any method below that stands in the blocks.

Formula: scores I [L] of the L blocks start at 0; high means unimportant. Every step floor(train L) blocks, drawn
without replacement with weights sigmoid(-I), train and the others rest. Every T steps K sets S_k of floor(damp L)
blocks are drawn with weights sigmoid(I); with the change of the tuners in S_k multiplied by beta, dropout off, l_k is
the loss of one batch (the same for all k), r_k = exp(-l_k), and for i in S_k, with p = sigmoid(I) of before,
I_i += mu (r_k - mean r) p_i (1 - p_i).
Count: that of the method below; ``train`` of it at any time (LLaMA-7B, LoRA r = 32 on q, k, v, up, down: 14,024,704).
Departure: the published code redraws sets until they differ, for ever where there are too few; here 20 times.
"""

from itertools import islice
from typing import Any

import torch

from deltaworks.core.calibration import evaluating
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.history import History
from deltaworks.core.layers import damped, drawn, layers, rest
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import OnTop, method, option

PROBES = 32  # batches that the losses are measured on, in turn


class ISTProcedure(Procedure):
    """The bandit. All draws depend on the adapter's seed, the step and the scores."""

    def __init__(self, delta: Delta, config: "IST") -> None:
        super().__init__(delta)
        self.config, self.step = config, 0
        self.layers = layers(delta)
        if not self.layers:
            raise UserError(f"{config}: the methods that it stands on have nothing in the blocks of the model")
        self.scores = torch.zeros(len(self.layers))
        self.trained = torch.zeros(len(self.layers), dtype=torch.long)  # steps that each layer has trained
        self.history = History()  # of the scores
        self.active: list[int] = []
        self.run: Run | None = None
        self.probes: list[Any] = []

    def part(self, share: float) -> int:
        """``share`` of the layers, at least one."""
        return max(1, int(share * len(self.layers)))

    def begin(self, run: Run) -> None:
        if run.loss is None:
            raise UserError("ist measures losses: it needs Run(batches=..., loss=...) in procedure.begin")
        if len(present := layers(self.delta)) < len(self.layers):  # a method beside this one took some off
            self.layers, self.scores, self.trained = present, self.scores[: len(present)], self.trained[: len(present)]
        self.run, self.probes = run, list(islice(run.batches, PROBES))
        if not self.probes:
            raise UserError("ist measures losses, and Run(batches=...) yields no batch")
        self.choose()

    def choose(self) -> None:
        """Draw the layers of this step."""
        count, name = self.part(self.config.train), f"{self.delta.seed}/ist/{self.step}"
        self.active = drawn(torch.sigmoid(-self.scores), count, name)
        tuners = list(self.layers.values())
        rest(self.delta, [t for index in range(len(tuners)) if index not in self.active for t in tuners[index]])

    def candidates(self) -> list[list[int]]:
        """K sets of layers, different where that can be had."""
        sets: list[list[int]] = []
        for index in range(self.config.candidates):
            for attempt in range(20):
                name = f"{self.delta.seed}/ist/{self.step}/{index}/{attempt}"
                chosen = drawn(torch.sigmoid(self.scores), self.part(self.config.damp), name)
                if chosen not in sets:
                    break
            sets.append(chosen)
        return sets

    def measured(self, chosen: list[int], batch: Any) -> float:
        """The loss of a batch with these layers' tuners damped."""
        assert self.run is not None
        assert self.run.loss is not None
        tuners = [tuner for index in chosen for tuner in list(self.layers.values())[index]]
        with torch.no_grad(), evaluating(self.delta.model), damped(tuners, self.config.beta):
            return float(self.run.loss(self.delta.model, batch))

    def update(self, sets: list[list[int]], losses: list[float]) -> None:
        """Move the scores of the layers in the sets."""
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float32))
        slope = torch.sigmoid(self.scores) * torch.sigmoid(-self.scores)
        for chosen, reward in zip(sets, rewards - rewards.mean(), strict=True):
            self.scores[chosen] += self.config.rate * reward * slope[chosen]

    def stepped(self) -> None:
        self.trained[self.active] += 1
        self.step += 1
        if self.step % self.config.interval == 0:
            batch = self.probes[(self.step // self.config.interval - 1) % len(self.probes)]
            sets = self.candidates()
            self.update(sets, [self.measured(chosen, batch) for chosen in sets])
            self.history.note(self.step, dict(zip(self.layers, self.scores.tolist(), strict=True)))
        self.choose()

    def end(self) -> None:
        rest(self.delta, [])

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self.scores, "trained": self.trained, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        if any(state[key].shape != self.scores.shape for key in ("scores", "trained")):
            raise UserError(f"the scores of the checkpoint are not those of {len(self.layers)} layers")
        self.step, self.scores, self.trained = state["step"], state["scores"].clone(), state["trained"].clone()
        self.history = History(state["history"])
        self.choose()

    def details(self) -> dict[str, Any]:
        trained = dict(zip(self.layers, self.trained.tolist(), strict=True))
        return {"ist_trained_steps": trained, "ist_score": self.history.data}


@method(
    "ist", family="procedures", paper="Yao et al., 2024, arXiv:2410.11772", learning_rate=1e-2, tried=(1e-3, 3e-3, 1e-2)
)
class IST(OnTop):
    train: float = option(0.25, "share of the layers that trains at each step", least=0, most=1)
    damp: float = option(0.5, "share of the layers that each candidate set damps", least=0, most=1)
    beta: float = option(0.25, "what the change of damped tuners is multiplied by", least=0, most=1)
    candidates: int = option(3, "K, the sets that one update compares", least=2)
    rate: float = option(10.0, "mu, the step of the scores", least=0)
    interval: int = option(10, "T, the steps between two updates of the scores", least=1)

    def procedure(self, delta: Delta) -> Procedure:
        return ISTProcedure(delta, self)
