"""What the trials of a run share: the data, the base model and the task of a recipe, found and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.registry import Config
from deltaworks.train.batching import Encoded, batches
from deltaworks.train.checkpointing import check_kind, checkpointed, uncached
from deltaworks.train.compiling import check_compiler, compiled
from deltaworks.train.data import Data, load_data
from deltaworks.train.devices import Team
from deltaworks.train.forgetting import Probe, probe_of
from deltaworks.train.models import Loaded, load_model
from deltaworks.train.packing import check_packable, check_packed, is_flat, packed
from deltaworks.train.recipe import Recipe
from deltaworks.train.tasks import Task, TokenTask, make_task
from deltaworks.train.writing import check_score, written_scores


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
    probe: Probe | None = None
    team: Team = field(default_factory=Team)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def steps(self) -> int:
        """Optimizer steps of one trial."""
        return steps_of(self.recipe, len(self.train))

    @property
    def points(self) -> list[int]:
        """Steps of the curve, the last one included."""
        count = self.recipe.curve_points
        return sorted({round(self.steps * (k + 1) / count) for k in range(count)} - {0})

    def batches(self) -> Iterator[list[Encoded]]:
        """The examples of each step, in the order of the seed."""
        recipe = self.recipe
        return batches(
            self.train, recipe.batch_size, recipe.seed, steps=self.steps, group_by_length=recipe.group_by_length
        )

    def attach(self) -> Delta:
        """A fresh adapter; what is random in it depends on the seed alone."""
        return attach(self.model, self.config, also=self.loaded.head, seed=self.recipe.seed)

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Examples to one batch to train on."""
        if self.recipe.packing:
            return packed(examples, self.task.processor.pad_token_id, flat=is_flat(self.model))
        return self.task.collate(examples)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The training loss of a batch, in the arithmetic of the recipe."""
        with self.arithmetic():
            return self.task.loss_of(model, batch)

    @contextmanager
    def lean(self, delta: Delta) -> Iterator[None]:
        """What the recipe asks for to save memory and time in training, while inside."""
        recipe = self.recipe
        with ExitStack() as stack:
            stack.enter_context(uncached(self.model))
            if recipe.compile:
                stack.enter_context(compiled(delta))
            stack.enter_context(checkpointed(delta, recipe.gradient_checkpointing))
            if recipe.packing:
                check_packed(self.model, str(self.config))
            yield

    def arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.recipe.bfloat16 else nullcontext()

    def evaluate(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """As ``Task.evaluate``, in this process alone."""
        with self.arithmetic():
            return self.task.evaluate(self.model, encoded, 2 * self.recipe.batch_size)

    def written(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Scores of what the model writes, in this process alone."""
        assert isinstance(self.task, TokenTask)  # as ``check_score`` made sure
        with self.arithmetic():
            return written_scores(self.model, self.task, encoded, self.recipe, 2 * self.recipe.batch_size)


@dataclass
class Batches:
    """Batches in the order of the seed, that can be gone through again; ``one_by_one`` gives batches of one."""

    stage: Stage
    one_by_one: bool = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for examples in self.stage.batches():
            for group in [[example] for example in examples] if self.one_by_one else [examples]:
                yield self.stage.collate(group)

    def __len__(self) -> int:
        return self.stage.steps * (self.stage.recipe.batch_size if self.one_by_one else 1)


def prepare(recipe: Recipe, data: Data | None = None, team: Team | None = None) -> Stage:
    """Load and check everything that a run needs. Raises UserError before any work is done."""
    config = recipe.config()
    team = team or Team()
    device = team.device or device_of(recipe.device)
    check_kind(recipe.gradient_checkpointing, device)
    if recipe.compile:
        check_compiler(device)
    if recipe.batch_size < team.size:
        raise UserError(f"batch_size={recipe.batch_size} leaves some of {team.size} processes nothing: raise it")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if data is None:
        data = read_data(recipe)
    if len(recipe.trained_rates(config)) > 1 and not data.validation:
        raise UserError("several rates are chosen between on validation rows, and there are none: raise validation")
    if recipe.search == "halving" and find_spec("optuna") is None:
        raise UserError("search=halving needs optuna: pip install 'deltaworks[search]'")
    shape = data.train[0]["image"].shape if data.train and "image" in data.train[0] else None
    loaded = load_model(
        recipe.model, data.task, labels=data.labels, dtype=recipe.dtype, seed=recipe.seed, image_shape=shape,
        quantization=recipe.quantization, device=device,
    )  # fmt: skip
    loaded.model.to(device)
    task = make_task(data.task, loaded.processor, recipe.max_length, recipe.target_length)
    if recipe.packing:
        check_packable(loaded.model, task)
    check_score(recipe, task, data.columns)
    train, validation, test = (task.encode(rows) for rows in (data.train, data.validation, data.test))
    probe = probe_of(recipe, task)
    return Stage(recipe, config, data, loaded, task, device, train, validation, test, probe, team)


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
