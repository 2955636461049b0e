"""The search over learning rates: each from the same start, the best on validation rows is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaworks.train.fitting import Attempt, Tell, fit
from deltaworks.train.stage import Stage


def search(stage: Stage, folder: Path, tell: Tell) -> list[Attempt]:
    """One trial for each rate; the adapter of the best one lies in ``folder`` afterwards."""
    trials: list[Attempt] = []
    rates = stage.recipe.trained_rates(stage.config)
    for number, rate in enumerate(rates):
        torch.manual_seed(stage.recipe.seed)
        delta = stage.attach()
        trial = Attempt(rate)
        trials.append(trial)

        def advance(event: dict[str, Any], number: int = number) -> None:
            tell({"event": "step", "rate": number, "rates": len(rates), "steps": stage.steps, **event})

        fit(stage, delta, trial, advance)
        trial.details = {} if trial.diverged else delta.procedure.details()
        if choose(trials) is trial and not trial.diverged:
            delta.save(folder)
        delta.detach()
    return trials


def choose(trials: Sequence[Attempt]) -> Attempt:
    """The trial with the highest validation score; without validation rows or scores, the first one."""
    return max(trials, key=lambda trial: (not trial.diverged, trial.score if trial.score is not None else -math.inf))
