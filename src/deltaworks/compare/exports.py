"""What the page gives away: its records as JSON, and a table of them as CSV, a row for each run."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from deltaworks.compare.entries import rank_of
from deltaworks.compare.scalars import ppt_of, pscp_of
from deltaworks.compare.standings import Comparison, Entry, score_of
from deltaworks.store.records import Record

_COLUMNS: dict[str, Callable[[Record], Any]] = {
    "family": lambda run: run.family,
    "seed": lambda run: run.seed,
    "status": lambda run: run.status,
    "validation_score": lambda run: run.validation.best,
    "trainable": lambda run: run.counts.trainable,
    "changed": lambda run: run.counts.changed,
    "head": lambda run: run.counts.head,
    "stored_bytes": lambda run: run.counts.stored_bytes,
    "peak_memory_bytes": lambda run: run.peak_memory_bytes,
    "training_samples_per_second": lambda run: run.training_samples_per_second,
    "inference_samples_per_second": lambda run: run.inference_samples_per_second,
    "wall_seconds": lambda run: run.wall_seconds,
    "learning_rate": lambda run: run.learning_rate,
    "rates_tried": lambda run: len(run.learning_rates),
    "steps": lambda run: run.steps,
    "batch_size": lambda run: run.batch_size,
    "rank_of_change": rank_of,
    "forgetting": lambda run: run.forgetting,
    "merge_error": lambda run: run.merge_error,
    "model": lambda run: run.model.id,
    "data": lambda run: run.data.name,
    "run_id": lambda run: run.run_id,
}


def exports(comparison: Comparison) -> dict[str, Any]:
    """A name for the files, the text of the CSV file and the records as JSON can hold them."""
    run = comparison.any_run
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run.data.name}-{run.model.id}").strip("-.")[:80]
    records = [record.model_dump(mode="json") for record in comparison.records]
    return {"name": name or "comparison", "csv": as_csv(comparison), "records": records}


def as_csv(comparison: Comparison) -> str:
    """A heading and a row for each run, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    score = f"{comparison.split}_{comparison.metric}"
    writer.writerow(["method", "spec", "rank", "ppt", "pscp", score, *_COLUMNS])  # the first five are of all its seeds
    for entry in comparison.entries:
        for run in sorted([*entry.runs, *entry.unfinished], key=lambda run: run.seed):
            writer.writerow([_safe(value) for value in _row(comparison, entry, run)])
    return text.getvalue()


def _row(comparison: Comparison, entry: Entry, run: Record) -> Sequence[Any]:
    score = score_of(run, comparison.split) if run.status == "finished" else None
    of_all = [entry.label, run.method, comparison.rank(entry), ppt_of(entry), pscp_of(comparison, entry)]
    return [*of_all, score, *(value(run) for value in _COLUMNS.values())]


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
