"""The table of results: one row for each entry, best first, one cell for each thing measured.

A cell holds the text that is read and the number that it sorts by; the template only lays them out.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from deltaworks.compare.colours import Look
from deltaworks.compare.pictures import ticks
from deltaworks.compare.scalars import ppt_of, pscp_of
from deltaworks.compare.standings import Comparison, Entry
from deltaworks.compare.wording import scientific, show_bytes, show_count, show_seconds, show_share, three_digits


@dataclass
class Cell:
    """One cell of the table: what is shown, the number it sorts by (None: last), whether it is the best."""

    text: str
    value: float | None = None
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """Heading, its explanation, the cell of an entry, and the order of the first click.

    Methods compete in a column whose ``better`` is "lower" or "higher"; those that are ``more`` are shown on demand.
    """

    heading: str
    about: str
    cell: Callable[[Entry], Cell]
    order: str = "ascending"
    better: str = ""
    more: bool = False


@dataclass
class Row:
    """One entry of the table; ``scale`` places the score's interval in per cent of the column's width."""

    index: int
    label: str
    spec: str
    family: str
    colour: int
    leads: bool
    first: bool
    baseline: bool
    rank: int | None
    cells: list[Cell]
    scale: tuple[float, float, float] | None


@dataclass
class Group:
    """Entries of one rank, and in words what the rank says."""

    rank: int
    about: str
    rows: list[Row]


def columns(comparison: Comparison) -> list[Column]:
    """The columns beside the method, the score first; those that no record fills are left out."""
    runs = comparison.records
    memory = comparison.any_run.peak_memory_includes
    text = next((run.forgetting_text for run in runs if run.forgetting_text), "text that was not trained on")
    higher = comparison.entries[0].higher_is_better
    found = [
        Column(
            f"{comparison.split.capitalize()} {comparison.metric}",
            "mean over the seeds with its 95 % interval over seeds and test examples",
            lambda entry: _score(comparison, entry),
            "descending" if higher else "ascending",
        ),
        Column(
            "Rank",
            "1 + the number of entries, baselines among them, that are clearly better",
            lambda entry: _measured(comparison.rank(entry), str),
        ),
        Column(
            "Trainable",
            "values the method trains, the head not counted",
            lambda entry: Cell(
                show_count(entry.any_run.counts.trainable),
                entry.any_run.counts.trainable,
                show_share(entry.any_run.counts.trainable, entry.any_run.model.parameters),
            ),
            better="lower",
        ),
        Column(
            "Stored",
            "bytes of the saved delta, the head among them",
            lambda entry: Cell(show_bytes(entry.any_run.counts.stored_bytes), entry.any_run.counts.stored_bytes),
            better="lower",
        ),
        Column(
            "Memory",
            f"at its peak; {memory}" if memory else "at its peak",
            lambda entry: _measured(entry.peak_memory_bytes, show_bytes),
            better="lower",
        ),
        Column(
            "Train time",
            "of one training at the measured speed; loading, trials and tests are not counted",
            lambda entry: _measured(entry.training_seconds, show_seconds),
            better="lower",
        ),
        Column(
            "Train /s",
            "training samples per second",
            lambda entry: _measured(entry.training_samples_per_second, show_speed),
            "descending",
            "higher",
        ),
        Column(
            "Infer /s",
            "inference samples per second",
            lambda entry: _measured(entry.inference_samples_per_second, show_speed),
            "descending",
            "higher",
        ),
        Column("Rate", "chosen learning rate", _rates, more=True),
        Column("Seeds", "finished runs of all runs, and the standard deviation of the score over them", _seeds),
        Column(
            "Changed",
            "values of the model that differ after merging, the head not counted",
            lambda entry: Cell(
                show_count(entry.any_run.counts.changed),
                entry.any_run.counts.changed,
                show_share(entry.any_run.counts.changed, entry.any_run.model.parameters),
            ),
            more=True,
        ),
        Column(
            "Rank of Δ",
            "numerical rank of the weight changes, the median over roles and seeds",
            lambda entry: _measured(entry.rank_of_change, lambda rank: f"{rank:g}"),
            more=True,
        ),
        Column(
            "Forgetting",
            f"rise of the mean loss in nats per token on {text}; less than 0: it fell",
            lambda entry: _measured(entry.median(lambda run: run.forgetting), lambda rise: f"{rise:+.3f}"),
            better="lower",
            more=True,
        ),
        Column(
            "Merge error",
            "largest difference of the outputs after merging",
            lambda entry: _measured(entry.median(lambda run: run.merge_error), lambda error: f"{error:.1e}"),
            more=True,
        ),
        Column(
            "PPT",
            "score × exp(-log10(trainable / 1e7 + 1)): V-PEFT Bench, arXiv:2402.02242",
            lambda entry: _measured(ppt_of(entry), lambda value: f"{value:.3f}"),
            "descending",
            "higher",
            more=True,
        ),
        Column(
            "PSCP",
            "score ÷ (1 + trainable / 6.2 % of the model) (1 + slowdown of inference / 119 %) (1 + memory / 11.7 bytes "
            "for each parameter): PEFT-Bench, arXiv:2511.21285, in our reading: its constants, made for models of "
            "8 billion parameters, scaled to the size of this one; the slowdown is over the frozen model",
            lambda entry: _measured(pscp_of(comparison, entry), lambda value: f"{value:.3f}"),
            "descending",
            "higher",
            more=True,
        ),
        Column(
            "All runs",
            "wall time of all runs of the method, trials and tests among them",
            lambda entry: _measured(entry.cost_seconds, show_seconds),
            more=True,
        ),
    ]
    return [column for column in found if any(column.cell(entry).text != "–" for entry in comparison.entries)]


def table(comparison: Comparison, looks: Sequence[Look], shown_columns: Sequence[Column]) -> list[Row]:
    """The rows of the table, best first, with the best value of each column marked."""
    low, high = _range(comparison)
    leaders = {id(entry) for entry in comparison.leaders}
    best = next(iter(comparison.candidates), None)

    def place(score: float) -> float:
        return round(100 * (score - low) / (high - low), 2)

    rows = []
    for index, (entry, look) in enumerate(zip(comparison.entries, looks, strict=True)):
        run = entry.any_run
        scale = None
        if entry.score is not None:
            start, end = entry.interval or (entry.score, entry.score)
            scale = place(start), place(entry.score), place(end)
        rows.append(
            Row(
                index=index,
                label=entry.label,
                spec="" if entry.baseline else _spec_below(run.method, entry.label),
                family="" if entry.baseline else run.family or look.group,
                colour=look.colour,
                leads=id(entry) in leaders and len(comparison.candidates) > 1,
                first=entry is best,
                baseline=entry.baseline is not None,
                rank=comparison.rank(entry),
                cells=[column.cell(entry) for column in shown_columns],
                scale=scale,
            )
        )
    _mark_best(rows, shown_columns)
    return rows


def rank_groups(rows: Sequence[Row]) -> list[Group]:
    """The rows that have a score by rank, best first; none where all have the same."""
    ranked = [row for row in rows if row.rank is not None]
    found = []
    for rank, members in groupby(sorted(ranked, key=lambda row: row.rank or 0), key=lambda row: row.rank or 0):
        about = "nothing is clearly better" if rank == 1 else f"{rank - 1} are clearly better"
        found.append(Group(rank, "1 is clearly better" if rank == 2 else about, list(members)))
    return found if len(ranked) > 1 else []


def score_ticks(comparison: Comparison) -> list[tuple[float, str]]:
    """Where round scores lie, in per cent of the width that ``Row.scale`` is told in, and their text."""
    low, high = _range(comparison)
    factor = 100 if comparison.scored and all(entry.is_proportion for entry in comparison.scored) else 1
    step = ticks(0.0, 0.7 * factor * (high - low))[1]
    marks = [step * place for place in range(math.ceil(factor * low / step), math.floor(factor * high / step) + 1)]
    unit = " %" if factor == 100 else ""
    return [(round(100 * (mark / factor - low) / (high - low), 2), f"{float(f'{mark:.6g}'):g}{unit}") for mark in marks]


def _spec_below(spec: str, label: str) -> str:
    """The spec, unless the label says the same already."""
    base, _, settings = spec.partition("[")
    said = f"[{settings}" in label if settings else base.lower() == label.lower()
    return "" if said or spec in label else spec


def _range(comparison: Comparison) -> tuple[float, float]:
    """The span of all intervals, a little widened, never empty."""
    ends = [end for entry in comparison.scored for end in (*(entry.interval or ()), entry.score) if end is not None]
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 0.5 * (abs(high) or 1.0)
    return low - pad, high + pad


# ---- cells ----------------------------------------------------------------------------------------------


def _score(comparison: Comparison, entry: Entry) -> Cell:
    """The score with its interval, or the word for why there is none."""
    if entry.score is None:
        statuses = [run.status for run in entry.unfinished]
        return Cell(next((word for word in ("diverged", "failed", "interrupted") if word in statuses), "no score"))
    note = "no interval"
    if entry.interval is not None:
        start, end = (comparison.show(score) for score in entry.interval)
        note = f"{start.removesuffix(' %')} to {end}"
    return Cell(comparison.show(entry.score), entry.score, note)


def _measured(value: float | None, show: Callable[[float], str]) -> Cell:
    return Cell("–") if value is None else Cell(show(value), value)


def show_speed(speed: float) -> str:
    """Samples per second such as ``1,200``, ``171``, ``9.50``."""
    return f"{speed:,.0f}" if speed >= 1000 else three_digits(speed)


def _rates(entry: Entry) -> Cell:
    """The chosen learning rates of the seeds: one, or the ends of their range."""
    rates = sorted({run.learning_rate for run in entry.runs if run.learning_rate is not None})
    if not rates:
        return Cell("–")
    first, last = (scientific(rate) for rate in (rates[0], rates[-1]))
    return Cell(first, statistics.median(rates), "" if first == last else f"to {last}")


def _seeds(entry: Entry) -> Cell:
    """Finished runs of all runs, with the standard deviation of the score."""
    finished, all_runs = len(entry.runs), len(entry.runs) + len(entry.unfinished)
    spread = entry.deviation
    note = "" if spread is None else f"sd {100 * spread:.1f}" if entry.is_proportion else f"sd {spread:.2g}"
    return Cell(str(finished) if finished == all_runs else f"{finished} of {all_runs}", finished, note)


def _mark_best(rows: Sequence[Row], shown_columns: Sequence[Column]) -> None:
    """Mark the best value of each column among the methods that have a score; baselines do not compete."""
    field = [row for row in rows if not row.baseline and row.scale is not None]
    if len(field) < 2:
        return
    for row in field:
        row.cells[0].best = row.leads
    for place, column in enumerate(shown_columns):
        values = [value for row in field if (value := row.cells[place].value) is not None]
        if not column.better or len(set(values)) < 2:
            continue
        best = max(values) if column.better == "higher" else min(values)
        for row in field:
            row.cells[place].best = row.cells[place].value == best
