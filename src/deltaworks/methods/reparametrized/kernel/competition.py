"""The competition of layers for a budget of changed entries (SNELLA): scores, rounds and who gets how many."""

from typing import Any

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.history import History
from deltaworks.core.procedure import Procedure, Run


def allocated(scores: list[float], sizes: list[int], budget: int) -> list[int]:
    """How many of ``budget`` entries each layer gets: by score, at most its size, and all of them in the end."""
    total = sum(scores)
    shares = [score / total for score in scores] if total > 0 else [1 / len(scores)] * len(scores)
    budget = min(budget, sum(sizes))
    given = [min(size, int(budget * share)) for size, share in zip(sizes, shares, strict=True)]
    while left := budget - sum(given):
        room = [layer for layer, size in enumerate(sizes) if given[layer] < size]
        weights = [shares[layer] for layer in room] if any(shares[layer] for layer in room) else [1.0] * len(room)
        parts = [int(left * weight / sum(weights)) for weight in weights]
        added = {layer: min(sizes[layer] - given[layer], part) for layer, part in zip(room, parts, strict=True)}
        if not any(added.values()):  # less than one each: one by one, the best first
            added = dict.fromkeys(sorted(room, key=lambda layer: -shares[layer])[:left], 1)
        for layer, count in added.items():
            given[layer] += count
    return given


class CompetitionProcedure(Procedure):
    """Scores the layers before each step and gives out the budget at the start of each round."""

    def __init__(self, delta: Any, config: Any) -> None:
        super().__init__(delta)
        self.config, self.step, self.steps, self.rounds = config, 0, 0, config.rounds
        self.tuners: dict[str, Any] = {item.key: item.tuner for item in delta.attached if item.tuner.config is config}
        self.scores: dict[str, Tensor] = {}  # by layer and factor: Ibar and U, [2, *shape]
        self.history = History()  # of the entries that may change

    def begin(self, run: Run) -> None:
        self.steps, self.rounds = run.steps, min(self.config.rounds, run.steps)
        if self.config.warmup + self.config.final >= 1:
            raise UserError("snella: warmup and final take all of the run: give less")
        for key, tuner in self.tuners.items():
            for name in "AB":
                factor = getattr(tuner, name)
                self.scores.setdefault(f"{key}.{name}", factor.new_zeros(2, *factor.shape).detach())

    def budget(self, turn: int) -> int:
        """B(t): how many entries of all layers together may change in round ``turn``."""
        total = sum(tuner.size for tuner in self.tuners.values())
        first, last = (1 - share for share in (self.config.initial, self.config.sparsity))
        warmup, final = (int(share * self.rounds) for share in (self.config.warmup, self.config.final))
        left = 1 - (turn - warmup) / (self.rounds - warmup - final)
        return int(total * (last + (first - last) * min(max(left, 0.0), 1.0) ** 3) + 1e-6)

    @torch.no_grad()
    def gradients(self) -> None:
        for key, tuner in self.tuners.items():
            for name in "AB":
                factor, (average, uncertainty) = getattr(tuner, name), self.scores[f"{key}.{name}"]
                if factor.grad is not None:
                    smoothed(average, uncertainty, (factor * factor.grad).abs().nan_to_num(), self.config.smoothing)

    def stepped(self) -> None:
        self.step += 1
        turn, before = (step * self.rounds // self.steps for step in (self.step, self.step - 1))
        warmup = int(self.config.warmup * self.rounds)
        if turn != before and warmup < turn < self.rounds:
            self.allocate(turn)

    def allocate(self, turn: int) -> None:
        names = {key: [f"{key}.A", f"{key}.B"] for key in self.tuners}
        scores = [sum(float(self.scores[n].prod(0).mean()) for n in pair) for pair in names.values()]
        sizes = [tuner.size for tuner in self.tuners.values()]
        given = allocated(scores, sizes, self.budget(turn))
        for tuner, entries in zip(self.tuners.values(), given, strict=True):
            tuner.allow(entries)
        self.history.note(self.step, dict(zip(self.tuners, given, strict=True)))
        self.delta.reshaped()

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self.scores, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.history = state["step"], History(state["history"])
        for name, score in state["scores"].items():
            key, _, factor = name.rpartition(".")
            own = getattr(self.tuners[key], factor)
            if score.shape[1:] != own.shape:
                raise UserError(f"the scores {name!r} of shape {list(score.shape)} fit no layer of this adapter")
            self.scores[name] = score.to(own.device, copy=True)

    def details(self) -> dict[str, Any]:
        return {"snella_entries": self.history.data}


def smoothed(average: Tensor, uncertainty: Tensor, sensitivity: Tensor, beta: float) -> None:
    """The moving averages Ibar and U take in another I, in place."""
    average.lerp_(sensitivity, 1 - beta)
    uncertainty.lerp_((sensitivity - average).abs(), 1 - beta)
