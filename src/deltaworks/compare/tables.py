"""The table of results: one row for each entry, best first, one cell for each thing measured.

A cell holds the text that is read and the number that it sorts by; the template only lays them out.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaworks.compare.colours import Look
from deltaworks.compare.standings import Comparison, Entry
from deltaworks.compare.wording import show_bytes, show_count, show_seconds, show_share, three_digits

# the columns in which methods compete beside the score, counted from it: whether more is better
_COMPETING = {1: False, 2: False, 3: False, 4: False, 5: True, 6: True}


@dataclass
class Cell:
    """One cell of the table: what is shown, the number it sorts by (None: last), whether it is the best."""

    text: str
    value: float | None = None
    note: str = ""
    best: bool = False


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
    cells: list[Cell]
    scale: tuple[float, float, float] | None


def columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Heading, its explanation, and the order of the first click."""
    measure = f"{comparison.split.capitalize()} {comparison.metric}"
    includes = comparison.any_run.peak_memory_includes
    first = "descending" if comparison.entries[0].higher_is_better else "ascending"
    return [
        ("Method", "name, spec and family", "ascending"),
        (measure, "mean over seeds with its 95 % interval: the wider of that over seeds and over test examples", first),
        ("Trainable", "values the method trains, the head not counted", "ascending"),
        ("Stored", "bytes of the saved delta", "ascending"),
        ("Memory", f"at its peak; {includes}" if includes else "at its peak", "ascending"),
        ("Train time", "wall time of one run", "ascending"),
        ("Train /s", "training samples per second", "descending"),
        ("Infer /s", "inference samples per second", "descending"),
        ("Rate", "chosen learning rate", "ascending"),
        ("Seeds", "finished runs of all runs", "descending"),
    ]


def table(comparison: Comparison, looks: Sequence[Look]) -> list[Row]:
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
                cells=_cells(comparison, entry),
                scale=scale,
            )
        )
    _mark_best(rows)
    return rows


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


def _cells(comparison: Comparison, entry: Entry) -> list[Cell]:
    """The cells of one entry, in the order of the columns, from the score on."""
    run = entry.any_run
    trainable = run.counts.trainable
    finished, all_runs = len(entry.runs), len(entry.runs) + len(entry.unfinished)
    return [
        _score(comparison, entry),
        Cell(show_count(trainable), trainable, show_share(trainable, run.model.parameters)),
        Cell(show_bytes(run.counts.stored_bytes), run.counts.stored_bytes),
        _measured(entry.peak_memory_bytes, show_bytes),
        _measured(entry.wall_seconds, show_seconds),
        _measured(entry.training_samples_per_second, show_speed),
        _measured(entry.inference_samples_per_second, show_speed),
        _rates(entry),
        Cell(str(finished) if finished == all_runs else f"{finished} of {all_runs}", finished),
    ]


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
    first, last = (_scientific(rate) for rate in (rates[0], rates[-1]))
    return Cell(first, statistics.median(rates), "" if first == last else f"to {last}")


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _mark_best(rows: Sequence[Row]) -> None:
    """Mark the best value of each column among the methods that have a score; baselines do not compete."""
    field = [row for row in rows if not row.baseline and row.scale is not None]
    if len(field) < 2:
        return
    for row in field:
        row.cells[0].best = row.leads
    for column, more_is_better in _COMPETING.items():
        values = [value for row in field if (value := row.cells[column].value) is not None]
        if len(set(values)) < 2:
            continue
        best = max(values) if more_is_better else min(values)
        for row in field:
            row.cells[column].best = row.cells[column].value == best
