"""One adapter trained at one rate, with the curve and the costs that it leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.delta import Delta
from deltaworks.core.forms import Replacement
from deltaworks.core.procedure import Run
from deltaworks.store.records import CurvePoint
from deltaworks.train import measure
from deltaworks.train.batching import length_of
from deltaworks.train.stage import Batches, Stage

Tell = Callable[[dict[str, Any]], None]
Stops = Callable[[int, float], bool]
"""Whether a trial is given up at a curve point, from its number (from 1) and its validation score."""
WARMING_STEPS = 2  # steps that timing leaves out: the first ones allocate and compile
PROBED_BATCHES = 20  # among which the longest one is taken to measure memory
HOPELESS = 1000.0  # a loss this many times the first one will not come back


@dataclass
class Attempt:
    """One rate: how training went."""

    rate: float
    curve: list[CurvePoint] = field(default_factory=list)
    score: float | None = None
    diverged: str = ""
    stopped_at: int | None = None
    steps: int = 0
    examples: int = 0
    timed_seconds: float = 0.0
    timed_samples: int = 0
    timed_tokens: int = 0
    peak_memory: int | None = None
    activations: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether it was trained to the end."""
        return not self.diverged and self.stopped_at is None


class _DivergedError(Exception):
    pass


def never(point: int, score: float) -> bool:
    """A trial that is not given up."""
    return False


def fit(stage: Stage, delta: Delta, trial: Attempt, tell: Tell, stops: Stops = never) -> None:
    """Train one adapter at one rate, to the end or until it ``stops``; what happened goes into ``trial``."""
    model = stage.model
    model.train()
    try:
        with stage.lean(delta):
            _fit(stage, delta, trial, tell, stops)
    except (_DivergedError, torch.linalg.LinAlgError) as error:  # a matrix that has become too wild to decompose
        trial.diverged = f"{error} (learning rate {trial.rate:g})"
    finally:
        model.eval()
        for parameter in delta.parameters():
            parameter.grad = None


def _fit(stage: Stage, delta: Delta, trial: Attempt, tell: Tell, stops: Stops) -> None:
    model, team = stage.model, stage.team
    delta.procedure.begin(Run(stage.steps, Batches(stage), stage.loss, Batches(stage, one_by_one=True)))
    team.unite(delta)
    shares = (stage.collate(team.share(examples)) for examples in islice(stage.batches(), PROBED_BATCHES))
    longest = max(shares, key=lambda batch: max(map(Tensor.numel, batch.values())))
    memory = measure.step_memory(model, lambda: stage.loss(model, longest))
    if stage.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(stage.device)
    optimizer = _steps(stage, delta, trial, tell, stops)
    trial.activations = memory.saved
    trial.peak_memory = (
        torch.cuda.max_memory_allocated(stage.device)
        if stage.device.type == "cuda"
        else measure.model_bytes(model) + measure.optimizer_bytes(optimizer) + memory.peak
    )
    if trial.stopped_at is not None:
        return
    delta.procedure.end()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in delta.parameters()):
        raise _DivergedError("a trained value is not finite after the last step")
    if stage.validation:
        outcome = team.of_main(lambda: stage.evaluate(stage.validation))
        if not math.isfinite(outcome["loss"]):
            raise _DivergedError("the validation loss is not finite after the last step")
        trial.score = outcome["score"]


def _steps(stage: Stage, delta: Delta, trial: Attempt, tell: Tell, stops: Stops) -> torch.optim.Optimizer:
    recipe, model, procedure, team = stage.recipe, stage.model, delta.procedure, stage.team
    steps, points = stage.steps, stage.points
    optimizer = torch.optim.AdamW(parameter_groups(stage, delta, trial.rate), fused=True)
    procedure.optimizing(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(steps, recipe.warmup, recipe.decay))
    since: list[float] = []
    ceiling = math.inf
    started = time.perf_counter()
    for step, examples in enumerate(stage.batches(), 1):
        batch = stage.collate(team.share(examples))
        with team.own_chance(f"{recipe.seed}/{step}"):
            loss = stage.loss(model, batch)
        loss = team.weighted(procedure.loss(loss), examples, stage.task.counted)
        value = team.sum(float(loss.detach()))
        ceiling = min(ceiling, HOPELESS * max(1.0, value)) if step == 1 else ceiling
        if not value <= ceiling:
            raise _DivergedError(f"the loss became {value:.3g} at step {step}")
        loss.backward()
        team.add_up(delta.parameters())
        torch.nn.utils.clip_grad_norm_(delta.parameters(), recipe.clip)
        procedure.gradients()
        optimizer.step()
        schedule.step()
        procedure.stepped()
        optimizer.zero_grad()
        trial.steps, trial.examples = step, trial.examples + len(examples)
        if step > WARMING_STEPS:
            trial.timed_seconds += time.perf_counter() - started
            trial.timed_samples += len(examples)
            trial.timed_tokens += sum(map(length_of, examples))
        since.append(value)
        event: dict[str, Any] = {"step": step, "loss": value}
        if step in points:
            team.check(delta)
            point = CurvePoint(step=step, loss=sum(since) / len(since))
            since = []
            trial.curve.append(point)
            if stage.validation and step < steps:
                score = point.validation = team.of_main(lambda: stage.evaluate(stage.validation)["score"])
                event["validation"] = score
                if stops(len(trial.curve), score):
                    trial.stopped_at, trial.score = step, score
        tell(event)
        if trial.stopped_at is not None:
            break
        started = time.perf_counter()
    return optimizer


def parameter_groups(stage: Stage, delta: Delta, rate: float) -> list[dict[str, Any]]:
    """The optimizer's groups; a fresh head gets ``head_rate`` unless it is all that the method trains."""
    groups = delta.parameter_groups(rate, stage.recipe.weight_decay)
    head_rate = stage.recipe.head_rate
    head = {
        id(parameter)
        for item in delta.attached
        if isinstance(item.tuner, Replacement) and item.place.path in stage.loaded.head
        for parameter in item.tuner.parameters()
    }
    if head_rate is None or all(id(parameter) in head for parameter in delta.parameters()):
        return groups
    split = []
    for group in groups:
        for is_head in (False, True):
            members = [p for p in group["params"] if (id(p) in head) == is_head]
            if members:
                split.append({**group, "params": members, "lr": head_rate if is_head else group["lr"]})
    return split


def rate_factor(steps: int, warmup: float, decay: str) -> Callable[[int], float]:
    """Factor of the rate at a step: rises to 1 over the share ``warmup`` of the steps, then falls to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        left = max(0.0, (steps - step) / max(1, steps - rising))
        return min((step + 1) / rising, left if decay == "linear" else (1 - math.cos(math.pi * min(1.0, left))) / 2)

    return factor
