"""The search over learning rates: each from the same start, the best on validation rows is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaworks.train.fitting import Attempt, Stops, Tell, fit, never
from deltaworks.train.stage import Stage

FACTOR = 3  # eta of successive halving: of the trials that reach a rung, the best third goes on


def search(stage: Stage, folder: Path, tell: Tell) -> list[Attempt]:
    """One trial for each rate, by ascending rate; the adapter of the best one lies in ``folder`` afterwards."""
    rates = stage.recipe.trained_rates(stage.config)
    halving = Halving(len(rates), len(stage.points)) if stage.recipe.search == "halving" and len(rates) > 1 else None
    trials: dict[float, Attempt] = {}

    def made() -> list[Attempt]:
        return [trials[rate] for rate in rates if rate in trials]

    def run(rate: float, stops: Stops) -> None:
        torch.manual_seed(stage.recipe.seed)
        delta = stage.attach()
        trial = trials[rate] = Attempt(rate)
        number = len(trials) - 1

        def advance(event: dict[str, Any]) -> None:
            tell({"event": "step", "rate": number, "rates": len(rates), "steps": stage.steps, **event})

        fit(stage, delta, trial, advance, stops)
        if trial.complete:
            trial.details = delta.procedure.details()
        if trial.complete and stage.team.main and choose(made()) is trial:
            delta.save(folder)
        delta.detach()

    for rate in from_the_middle(rates) if halving else rates:
        run(rate, halving.trial() if halving else never)
    # where what the others were given up for diverged in the end, the best of them has its turn again
    while not any(trial.complete for trial in trials.values()):
        stopped = [trial for trial in made() if trial.stopped_at is not None]
        if not stopped:
            break
        run(max(stopped, key=score_of).rate, never)
    return made()


def choose(trials: Sequence[Attempt]) -> Attempt:
    """The complete trial with the highest validation score; without validation rows or scores, the first one."""
    return max(trials, key=lambda trial: (trial.complete, score_of(trial)))


def score_of(trial: Attempt) -> float:
    """The validation score, below all others where there is none."""
    return -math.inf if trial.score is None else trial.score


def from_the_middle(rates: Sequence[float]) -> list[float]:
    """The likeliest rates first: what comes later is given up for what came before."""
    middle = (len(rates) - 1) / 2
    return [rates[index] for index in sorted(range(len(rates)), key=lambda index: (abs(index - middle), index))]


class Halving:
    """Asynchronous successive halving by optuna (Li et al., 2020, arXiv:1810.05934).

    The first rung lies at 1 / 3^s of the curve points, where 3^s is the number of ``trials`` or less, but at least 3:
    the first bracket of Hyperband (Li et al., 2018, arXiv:1603.06560). Every further rung is three times as far.
    """

    def __init__(self, trials: int, points: int) -> None:
        import optuna

        share = FACTOR
        while share * FACTOR <= trials:
            share *= FACTOR
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(max(1, points // share), FACTOR)
        self.study = optuna.create_study(direction="maximize", pruner=pruner)

    def trial(self) -> Stops:
        """What one more trial asks at each curve point (number from 1, validation score): whether it ends there."""
        asked = self.study.ask()

        def stops(point: int, score: float) -> bool:
            asked.report(score, point)
            return asked.should_prune()

        return stops
