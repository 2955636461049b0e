"""The model card of a trained adapter, from its recipe and its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltaworks.store.card import card, listed
from deltaworks.store.hub import hub_id
from deltaworks.store.records import Record
from deltaworks.train.models import BUILT_IN, LABELLED, PUBLISHED
from deltaworks.train.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PIPELINES = {
    "classification": "text-classification",
    "pairs": "text-classification",
    "causal": "text-generation",
    "seq2seq": "text-generation",
    "images": "image-classification",
}
"""What the Hub calls the tasks."""
SHOWN_CLASSES = 12


def card_of_run(recipe: Recipe, record: Record, place: str | Path) -> str:
    """The card of the adapter that ``deltaworks tune`` trained, to be loaded from ``place``."""
    own = recipe.data.partition(":")[0]
    published = "/" in own and hub_id(own) is not None
    return card(
        recipe.config(),
        record.model.id,
        facts(record),
        loading(recipe, record, place),
        base_id=PUBLISHED.get(recipe.model) if recipe.model in BUILT_IN else hub_id(recipe.model),
        datasets=[own] if published else [],
        pipeline=PIPELINES.get(record.data.task),
        scores=scores(record, own if published else record.data.name),
    )


def facts(record: Record) -> dict[str, str]:
    """The rows of its table: what was trained, on what, how, with what result."""
    classes = record.data.labels
    shown = ", ".join(classes[:SHOWN_CLASSES]) + (", ..." if len(classes) > SHOWN_CLASSES else "")
    rate = "none" if record.learning_rate is None else f"{record.learning_rate:g}"
    tried = len(record.learning_rates)
    sizes = ", ".join(f"{count:,} {split}" for split, count in record.data.sizes.items())
    test = record.test
    rows = {
        "method": f"`{record.method}` on {record.targets or 'its own places'}",
        "base": f"{record.model.id}, {record.model.parameters:,} parameters",
        "data": f"{record.data.name} ({record.data.task}): {sizes}",
        "classes": f"{len(classes)}: {shown}" if classes else "",
        "trained": f"{record.counts.trainable:,} values and a head of {record.counts.head:,}",
        "stored": f"{record.counts.stored_bytes:,} bytes",
        "training": f"{record.steps} steps of {record.batch_size}, {record.optimizer}, seed {record.seed}",
        "learning rate": f"{rate}, the best of {tried} tried on {record.learning_rate_split or 'no split'}"
        if tried > 1
        else rate,
        "test": "" if test is None or test.score is None else f"{test.metric} {test.score:.4f}",
        "forgetting": ""
        if record.forgetting is None
        else f"{record.forgetting:+.4f} nats per token on {record.forgetting_text}",
        "status": record.status + (f": {record.message}" if record.message else ""),
        "hardware": record.hardware,
        "versions": listed(record.versions),
    }
    return {key: text for key, text in rows.items() if text}


def loading(recipe: Recipe, record: Record, place: str | Path) -> str:
    """Python that builds the base as it was trained, with its head, and attaches the adapter."""
    task = record.data.task
    lines = ["import deltaworks as dw", "from deltaworks.train.models import load_model"]
    lines += ["from deltaworks.train.quantizing import Quantization"] if recipe.quantization else []
    lines.append("")
    if task in LABELLED:
        lines.append(f"labels = {record.data.labels}")
    options = ["labels=labels"] if task in LABELLED else []
    options += [f'dtype="{recipe.dtype}"'] if recipe.dtype != "float32" else []
    options += [f"quantization={recipe.quantization!r}"] if recipe.quantization else []
    lines.append(f"model = load_model({', '.join([f'{recipe.model!r}', f'{task!r}', *options])}).model")
    lines.append(f'delta = dw.load(model, "{place}")  # or its id on the Hub')
    return "\n".join(lines) + "\n"


def scores(record: Record, data: str) -> list[EvalResult]:
    """The result on the test split, as the Hub indexes it."""
    from huggingface_hub import EvalResult

    if record.test is None or record.test.score is None:
        return []
    return [
        EvalResult(
            task_type=PIPELINES.get(record.data.task, "other"),
            dataset_type=data,
            dataset_name=record.data.name,
            dataset_split="test",
            metric_type=record.test.metric.replace(" ", "_"),
            metric_name=record.test.metric,
            metric_value=round(record.test.score, 6),
        )
    ]
