"""One training run in this process: the rates of a recipe tried, the best one chosen, everything measured."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement
from deltaworks.core.procedure import Run
from deltaworks.core.registry import Config
from deltaworks.store.checkpoint import load
from deltaworks.store.records import CurvePoint, Record, Score, Trial, Validation
from deltaworks.train import measure
from deltaworks.train.batching import Encoded, batches
from deltaworks.train.data import Data, load_data
from deltaworks.train.models import Loaded, load_model
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import counts_of, facts_of, ranks_are_quick, ranks_of
from deltaworks.train.tasks import Task, make_task

Tell = Callable[[dict[str, Any]], None]
WARMING_STEPS = 2  # steps that timing leaves out: the first ones allocate and compile
PROBED_BATCHES = 20  # among which the longest one is taken to measure memory
HOPELESS = 1000.0  # a loss this many times the first one will not come back


@dataclass
class Stage:
    """What the trials of a run share: data, base model and task."""

    recipe: Recipe
    config: Config
    data: Data
    loaded: Loaded
    task: Task
    device: torch.device
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def steps(self) -> int:
        """Optimizer steps of one trial."""
        return steps_of(self.recipe, len(self.train))

    def attach(self) -> Delta:
        """A fresh adapter; what is random in it depends on the seed alone."""
        return attach(self.model, self.config, also=self.loaded.head, seed=self.recipe.seed)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The training loss of a batch, in the arithmetic of the recipe."""
        with self.arithmetic():
            return self.task.loss_of(model, batch)

    def arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.recipe.bfloat16 else nullcontext()

    def evaluate(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        with self.arithmetic():
            return self.task.evaluate(self.model, encoded, 2 * self.recipe.batch_size)


@dataclass
class Batches:
    """Batches in the order of the seed, that can be gone through again; ``one_by_one`` gives batches of one."""

    stage: Stage
    one_by_one: bool = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        recipe = self.stage.recipe
        chosen = batches(
            self.stage.train, recipe.batch_size, recipe.seed,
            steps=self.stage.steps, group_by_length=recipe.group_by_length,
        )  # fmt: skip
        for examples in chosen:
            for group in [[example] for example in examples] if self.one_by_one else [examples]:
                yield self.stage.task.collate(group)

    def __len__(self) -> int:
        return self.stage.steps * (self.stage.recipe.batch_size if self.one_by_one else 1)


@dataclass
class Attempt:
    """One rate: how training went."""

    rate: float
    curve: list[CurvePoint] = field(default_factory=list)
    score: float | None = None
    diverged: str = ""
    steps: int = 0
    examples: int = 0
    timed_seconds: float = 0.0
    timed_samples: int = 0
    timed_tokens: int = 0
    peak_memory: int | None = None
    activations: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, data: Data | None = None) -> Stage:
    """Load and check everything that a run needs. Raises UserError before any work is done."""
    config = recipe.config()
    device = device_of(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if data is None:
        data = read_data(recipe)
    if len(recipe.tried_rates(config)) > 1 and not data.validation:
        raise UserError("several rates are chosen between on validation rows, and there are none: raise validation")
    shape = data.train[0]["image"].shape if data.train and "image" in data.train[0] else None
    loaded = load_model(
        recipe.model, data.task, labels=data.labels, dtype=recipe.dtype, seed=recipe.seed, image_shape=shape
    )
    loaded.model.to(device)
    if recipe.gradient_checkpointing:
        checkpointed(loaded.model)
    task = make_task(data.task, loaded.processor, recipe.max_length)
    encoded = [task.encode(rows) for rows in (data.train, data.validation, data.test)]
    return Stage(recipe, config, data, loaded, task, device, *encoded)


def steps_of(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of one trial over so many training examples."""
    if recipe.steps is not None:
        return recipe.steps
    return max(1, round((recipe.epochs or 3) * math.ceil(examples / recipe.batch_size)))


def read_data(recipe: Recipe) -> Data:
    """The data of a recipe, the same for every seed."""
    return load_data(
        recipe.data, task=recipe.task, columns=recipe.columns, test=recipe.test, limit=recipe.limit,
        limit_per_class=recipe.limit_per_class, test_limit=recipe.test_limit, validation=recipe.validation,
        seed=recipe.data_seed,
    )  # fmt: skip


def device_of(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def checkpointed(model: Any) -> None:
    """Let a model recompute its activations. Raises UserError where it cannot."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing: leave gradient_checkpointing out")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def train(
    recipe: Recipe,
    *,
    data: Data | None = None,
    adapter: Path | None = None,
    tell: Tell = lambda event: None,
) -> Record:
    """Train as the recipe says and return the record; a run that diverges is one with that status.

    Every rate is trained from the same start on the training split; the best on validation is kept (never the
    test split) and tested once. ``adapter`` is the folder where it is saved; without one it is not kept. ``tell``
    gets progress as dictionaries. Raises UserError for what the user can mend, before the training begins.
    """
    began, clock = datetime.now(UTC), time.perf_counter()
    stage = prepare(recipe, data)
    tell({"event": "prepared", "steps": stage.steps, "rates": recipe.tried_rates(stage.config)})
    cuda = stage.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="deltaworks-") as scratch:
        folder = adapter or Path(scratch) / "adapter"
        trials = search(stage, folder, tell)
        best = choose(trials)
        fields: dict[str, Any] = {
            **facts_of(recipe, stage.config, stage.data, stage.loaded, stage.steps),
            "learning_rates": [Trial(rate=trial.rate, score=trial.score) for trial in trials],
            "learning_rate": best.rate,
            "learning_rate_split": "validation" if stage.validation else "",
            "examples": best.examples,
            "curve": best.curve,
            "peak_memory_bytes": best.peak_memory,
            "peak_memory_includes": measure.INCLUDES_CUDA if cuda else measure.INCLUDES_TENSORS,
            "saved_activation_bytes": best.activations,
            "training_samples_per_second": per_second(best.timed_samples, best.timed_seconds),
            "training_tokens_per_second": per_second(best.timed_tokens, best.timed_seconds),
            "process_peak_bytes": measure.process_peak_bytes(),
            "details": best.details,
            "hardware": measure.hardware(stage.device),
            "versions": measure.versions(),
            "started": began,
        }
        if best.diverged:
            fields |= {"status": "diverged", "message": best.diverged}
        else:
            fields |= {"status": "finished", **examine(stage, folder, tell)}
            scores = [point.validation for point in best.curve if point.validation is not None]
            fields["validation"] = Validation(last=best.score, best=max(scores, default=best.score))
    fields |= {"finished": datetime.now(UTC), "wall_seconds": time.perf_counter() - clock}
    return Record(**fields)


def search(stage: Stage, folder: Path, tell: Tell) -> list[Attempt]:
    """One trial for each rate; the adapter of the best one lies in ``folder`` afterwards."""
    trials: list[Attempt] = []
    rates = stage.recipe.tried_rates(stage.config)
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


class _DivergedError(Exception):
    pass


def fit(stage: Stage, delta: Delta, trial: Attempt, tell: Tell) -> None:
    """Train one adapter at one rate; what happened goes into ``trial``."""
    model = stage.model
    model.train()
    try:
        delta.procedure.begin(Run(stage.steps, Batches(stage), stage.loss, Batches(stage, one_by_one=True)))
        longest = max(islice(Batches(stage), PROBED_BATCHES), key=lambda batch: max(map(Tensor.numel, batch.values())))
        memory = measure.step_memory(model, lambda: stage.loss(model, longest))
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(stage.device)
        optimizer = _steps(stage, delta, trial, tell)
        trial.activations = memory.saved
        trial.peak_memory = (
            torch.cuda.max_memory_allocated(stage.device)
            if stage.device.type == "cuda"
            else measure.model_bytes(model) + measure.optimizer_bytes(optimizer) + memory.peak
        )
        delta.procedure.end()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in delta.parameters()):
            raise _DivergedError("a trained value is not finite after the last step")
        if stage.validation:
            outcome = stage.evaluate(stage.validation)
            if not math.isfinite(outcome["loss"]):
                raise _DivergedError("the validation loss is not finite after the last step")
            trial.score = outcome["score"]
    except _DivergedError as error:
        trial.diverged = f"{error} (learning rate {trial.rate:g})"
    finally:
        model.eval()
        for parameter in delta.parameters():
            parameter.grad = None


def _steps(stage: Stage, delta: Delta, trial: Attempt, tell: Tell) -> torch.optim.Optimizer:
    recipe, model, procedure, steps = stage.recipe, stage.model, delta.procedure, stage.steps
    optimizer = torch.optim.AdamW(parameter_groups(stage, delta, trial.rate), fused=True)
    procedure.optimizing(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_decay(steps, recipe.warmup))
    points = {round(steps * (k + 1) / recipe.curve_points) for k in range(recipe.curve_points)}
    since: list[float] = []
    ceiling = math.inf
    for step, batch in enumerate(Batches(stage), 1):
        started = time.perf_counter()
        loss = procedure.loss(stage.loss(model, batch))
        value = float(loss.detach())
        ceiling = min(ceiling, HOPELESS * max(1.0, value)) if step == 1 else ceiling
        if not value <= ceiling:
            raise _DivergedError(f"the loss became {value:.3g} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(delta.parameters(), recipe.clip)
        procedure.gradients()
        optimizer.step()
        schedule.step()
        procedure.stepped()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        size = len(batch["labels"])
        trial.steps, trial.examples = step, trial.examples + size
        if step > WARMING_STEPS:
            trial.timed_seconds += seconds
            trial.timed_samples += size
            trial.timed_tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0
        since.append(value)
        event: dict[str, Any] = {"step": step, "loss": value}
        if step in points:
            point = CurvePoint(step=step, loss=sum(since) / len(since))
            if stage.validation and step < steps:
                point.validation = event["validation"] = stage.evaluate(stage.validation)["score"]
            since = []
            trial.curve.append(point)
        tell(event)
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


def linear_decay(steps: int, warmup: float) -> Callable[[int], float]:
    """Factor of the rate at a step: rises to 1 over the share ``warmup`` of the steps, then falls to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))

    return factor


def examine(stage: Stage, folder: Path, tell: Tell) -> dict[str, Any]:
    """The saved adapter on the test split, and its counts, ranks and error of merging, as fields of the record."""
    tell({"event": "test"})
    delta = load(stage.model, folder)
    started = time.perf_counter()
    outcome = stage.evaluate(stage.test)
    seconds = time.perf_counter() - started
    marks = outcome["correct"]
    binary = all(mark in (0, 1) for mark in marks) and "tokens" not in outcome
    score = outcome["score"] if math.isfinite(outcome["loss"]) else None
    found = delta.report(ranks=stage.recipe.ranks and ranks_are_quick(delta))
    tokens = sum(len(example.get("input_ids", ())) for example in stage.test)
    fields = {
        "test": Score(
            metric=outcome["metric"],
            score=score,
            correct="".join(str(int(mark)) for mark in marks) if binary else None,
        ),
        "inference_samples_per_second": per_second(len(stage.test), seconds),
        "inference_tokens_per_second": per_second(tokens, seconds),
        "counts": counts_of(delta, found, stage.loaded.head, measure.folder_bytes(folder)),
        "sites": len({item.place.path for item in delta.attached if item.member < len(delta.members)}),
        "rank": ranks_of(found),
        "merge_error": measure.merge_error(delta, lambda: output_of(stage)),
    }
    delta.detach()
    return fields


def output_of(stage: Stage) -> Tensor:
    """The logits of a few test examples, without gradient; the model is in evaluation mode."""
    batch = {key: value.to(stage.device) for key, value in stage.task.collate(stage.test[:8]).items()}
    if stage.task.name != "seq2seq":  # there the decoder's input is made from the labels
        batch.pop("labels", None)
    with torch.no_grad(), stage.arithmetic():
        output = stage.model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None
