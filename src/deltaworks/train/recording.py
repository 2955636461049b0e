"""From a run to the fields of its record: facts, counts, ranks, and the key by which a run is known."""

from __future__ import annotations

import statistics
from typing import Any

from deltaworks.core.delta import Delta
from deltaworks.core.forms import Replacement
from deltaworks.core.places import features_of
from deltaworks.core.quantized import entries, is_quantized
from deltaworks.core.registry import Config, as_data
from deltaworks.core.report import Report
from deltaworks.store.records import Counts, DataFacts, ModelFacts, RankOfChange, Record, run_key
from deltaworks.train.data import Data
from deltaworks.train.models import Loaded
from deltaworks.train.recipe import Recipe

RANK_BUDGET = 5e9  # sum of out x in x min(out, in) over the changed weights: a few seconds on one core
SCHEDULE = (
    "epochs", "head_rate", "weight_decay", "warmup", "clip", "max_length", "group_by_length", "gradient_checkpointing",
)  # fmt: skip
"""Fields of a recipe that decide a result and have no field of their own in a record."""
LATER = {"search", "searched_on", "decay", "target_length", "score", "beams", "packing", "compile"}
"""Such fields that are named only where they are not the default, so that the keys of earlier runs stay."""


def settings_of(recipe: Recipe, config: Config) -> dict[str, Any]:
    """The options of the method and of the schedule: what a record calls its configuration."""
    members = as_data(config)
    if len(members) == 1:
        options = {key: value for key, value in members[0].items() if key != "method"}
    else:
        options = {
            f"{member['method']}.{key}": value for member in members for key, value in member.items() if key != "method"
        }
    schedule = {"rates": recipe.tried_rates(config), **recipe.model_dump(include=set(SCHEDULE))}
    schedule |= recipe.model_dump(include=LATER, exclude_defaults=True)
    return {**options, "schedule": schedule}


def key_of(recipe: Recipe, config: Config, data: Data, base: str, steps: int) -> str:
    """The id of a run, known before it starts. Its learning rate is part of the schedule, not of the outcome."""
    return run_key(
        model=base,
        data_digest=data.digest,
        task=data.task,
        method=str(config),
        config=settings_of(recipe, config),
        targets=targets_of(config),
        learning_rate=None,
        seed=recipe.seed,
        steps=steps,
        batch_size=recipe.batch_size,
        dtype=dtypes_of(recipe),
    )


def targets_of(config: Config) -> str:
    """What the method stands around, in the words of its configuration."""
    return " + ".join(dict.fromkeys(part.targets for part in config.parts() if part.targets))


def dtypes_of(recipe: Recipe) -> dict[str, str]:
    compute = "bfloat16" if recipe.bfloat16 else recipe.dtype
    single = recipe.quantize in ("nf4", "fp4") and not recipe.double_quantization
    base = f"{recipe.quantize}{' (single quantization)' * single}" if recipe.quantize else recipe.dtype
    return {"base": base, "trained": "float32", "compute": compute}


def facts_of(recipe: Recipe, config: Config, data: Data, loaded: Loaded, steps: int) -> dict[str, Any]:
    """The fields of a record that are known before the training."""
    per_epoch = max(1, len(data.train))
    return {
        "run_id": key_of(recipe, config, data, loaded.base, steps),
        "method": str(config),
        "family": config.family or " + ".join(dict.fromkeys(part.family for part in config.parts())),
        "paper": "; ".join(dict.fromkeys(part.paper for part in config.parts())),
        "config": settings_of(recipe, config),
        "targets": targets_of(config),
        "counts": Counts(trainable=0, changed=0, stored_bytes=0),
        "model": ModelFacts(id=loaded.base, parameters=sum(map(entries, loaded.model.parameters()))),
        "dtypes": dtypes_of(recipe),
        "optimizer": f"AdamW, {recipe.decay} decay",
        "steps": steps,
        "epochs": steps * recipe.batch_size / per_epoch,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "searched_on": recipe.searched_on,
        "data": DataFacts(
            name=data.name,
            digest=data.digest,
            task=data.task,
            labels=data.labels or [],
            sizes={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        ),
    }


def failed_record(facts: dict[str, Any], message: str) -> Record:
    """The record of a run that ended without a result."""
    return Record(**{**facts, "status": "failed", "message": message})


def counts_of(delta: Delta, found: Report, head: list[str], stored_bytes: int) -> Counts:
    """Counts of the method and, apart from them, of the fresh head that every method trains."""
    of_head = {
        id(parameter): parameter.numel()
        for item in delta.attached
        if isinstance(item.tuner, Replacement) and item.place.path in head
        for parameter in item.tuner.parameters()
    }
    size = sum(of_head.values())
    roles = {item.place.role for item in delta.attached if item.place.path in head}
    changed_by_head = sum(row.changed for row in found.rows if row.role in roles)
    return Counts(
        trainable=found.trainable - size,
        changed=max(0, found.changed - min(changed_by_head, size)),
        stored_bytes=stored_bytes,
        head=size,
    )


def ranks_are_quick(delta: Delta) -> bool:
    """Whether the singular values of all changed weights can be had in seconds."""
    cost = 0.0
    for item in delta.attached:
        module = delta.model.get_submodule(item.place.path)
        weight = module._parameters.get("weight")
        if item.tuner.form() != 3 and weight is not None and weight.dim() > 1:
            out, inner = features_of(module) if is_quantized(module) else (weight.shape[0], weight[0].numel())
            cost += out * inner * min(out, inner)
    return cost < RANK_BUDGET


def ranks_of(found: Report) -> dict[str, RankOfChange]:
    """The rank of the change by role, where it was measured."""
    return {
        row.role: RankOfChange(median=statistics.median(row.ranks), max=max(row.ranks))
        for row in found.rows
        if row.ranks
    }
