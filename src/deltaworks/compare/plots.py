"""The figures: score against each cost with its Pareto front, and the curves of training.

Here is only their data, as JSON can hold it; the script of the page draws them with plotly.
"""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaworks.compare.colours import Look
from deltaworks.compare.standings import Comparison, Entry
from deltaworks.compare.tables import show_speed
from deltaworks.compare.wording import show_bytes, show_count, show_seconds, show_share

# More points than this on a line cannot be seen on a screen.
_CURVE_POINTS = 240

_CURVES = (("validation", "Validation score while training"), ("loss", "Training loss"))


@dataclass(frozen=True)
class _Axis:
    """A cost that the score is plotted against.

    ``units`` are (least cost to use it, its size, its name), the largest first.
    """

    title: str
    label: str
    cost: Callable[[Entry], float | None]
    units: tuple[tuple[float, float, str], ...] = ()
    logarithmic: bool = False


_BYTES = ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0.0, 1.0, "bytes"))

_AXES = (
    _Axis(
        "Score and size",
        "trainable parameters",
        lambda entry: entry.any_run.counts.trainable,
        logarithmic=True,
    ),
    _Axis(
        "Score and storage",
        "stored",
        lambda entry: entry.any_run.counts.stored_bytes or None,
        units=_BYTES,
    ),
    _Axis(
        "Score and memory",
        "peak memory",
        lambda entry: entry.peak_memory_bytes,
        units=_BYTES,
    ),
    _Axis(
        "Score and training time",
        "time of one training",
        lambda entry: entry.training_seconds,
        units=((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.0, 1.0, "s")),
    ),
    _Axis(
        "Score and inference time",
        "inference time of 1,000 examples",
        lambda entry: 1000 / entry.inference_samples_per_second if entry.inference_samples_per_second else None,
        units=((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.3, 1.0, "s"), (0.0, 1e-3, "ms")),
    ),
)


def plots(comparison: Comparison, looks: Sequence[Look]) -> dict[str, Any]:
    """The data of the plots as JSON can hold it; the page draws them."""
    proportion = bool(comparison.scored) and all(entry.is_proportion for entry in comparison.scored)
    factor, unit = (100, " (%)") if proportion else (1, "")
    leaders = {id(entry) for entry in comparison.leaders}
    points = [
        {
            "row": index,
            "label": _for_plotly(entry.label),
            "group": look.group,
            "colour": look.colour,
            "symbol": look.symbol,
            "leads": id(entry) in leaders,
            "baseline": entry.baseline,
            "score": None if entry.score is None else factor * entry.score,
            "interval": None if entry.interval is None else [factor * end for end in entry.interval],
            "hover": _hover(comparison, entry),
            "curve": _curves(entry, factor),
        }
        for index, (entry, look) in enumerate(zip(comparison.entries, looks, strict=True))
    ]
    return {
        "measure": _for_plotly(f"{comparison.split} {comparison.metric}{unit}"),
        "validation": _for_plotly(f"validation {comparison.metric}{unit}" if comparison.metric else "score"),
        "points": points,
        "scatters": [found for axis in _AXES if (found := _scatter(comparison, axis)) is not None],
    }


def curves_drawn(drawn: dict[str, Any]) -> list[tuple[str, str]]:
    """Kind and heading of the curves that have a point to show in ``drawn``, what ``plots`` gave."""
    return [(kind, heading) for kind, heading in _CURVES if any(point["curve"][kind][0] for point in drawn["points"])]


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats (lower cost, higher gain), from cheap to dear."""
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -gains[index], index))
    front: list[int] = []
    for index in order:
        if not front or gains[index] > gains[front[-1]]:
            front.append(index)
    return front


def _scatter(comparison: Comparison, axis: _Axis) -> dict[str, Any] | None:
    """One plot of score against a cost; None where no run measured it."""
    measured = [
        (index, entry.score, cost)
        for index, entry in enumerate(comparison.entries)
        if entry.score is not None and (cost := axis.cost(entry)) is not None
    ]
    unplaced = [index for index, _, cost in measured if axis.logarithmic and cost == 0]
    known = [point for point in measured if point[0] not in unplaced]
    if not known:
        return None
    rows, scores, costs = zip(*known, strict=True)
    label, size = axis.label, 1.0
    if axis.units:
        _, size, unit = next(unit for unit in axis.units if max(costs) >= unit[0])
        label += f" ({unit})"
    logarithmic = axis.logarithmic or (min(costs) > 0 and max(costs) / min(costs) > 20)
    if logarithmic:
        label += ", log scale"
    sign = 1.0 if comparison.entries[0].higher_is_better else -1.0
    front = pareto_front(costs, [sign * score for score in scores])
    return {
        "title": axis.title,
        "axis": label,
        "logarithmic": logarithmic,
        "rows": list(rows),
        "costs": [cost / size for cost in costs],
        "front": [rows[position] for position in sorted(front, key=lambda position: costs[position])],
        "unplaced": unplaced,
    }


def _curves(entry: Entry, factor: float) -> dict[str, list[list[float]]]:
    """Mean over the seeds of training loss and validation score: [steps, values] each."""
    curves = [run.curve for run in entry.runs or entry.unfinished]
    loss = _mean_curve([{p.step: p.loss for p in curve if p.loss is not None} for curve in curves])
    score = _mean_curve(
        [{p.step: factor * p.validation for p in curve if p.validation is not None} for curve in curves]
    )
    return {"loss": loss, "validation": score}


def _mean_curve(by_seed: Sequence[dict[int, float]]) -> list[list[float]]:
    """Values averaged over the seeds at the steps all seeds have, thinned to what a screen can show."""
    shared = sorted(set.intersection(*(set(values) for values in by_seed))) if by_seed else []
    if not shared:
        return [[], []]
    width = math.ceil(len(shared) / _CURVE_POINTS)
    bins = [shared[start : start + width] for start in range(0, len(shared), width)]
    steps = [float(steps[-1]) for steps in bins]
    means = [statistics.fmean(values[step] for step in steps for values in by_seed) for steps in bins]
    return [steps, [float(f"{mean:.6g}") for mean in means]]


def _for_plotly(text: str) -> str:
    """Text that plotly shows as it is: its small markup language is switched off."""
    return html.escape(text, quote=False)


def _hover(comparison: Comparison, entry: Entry) -> str:
    """The lines shown when a point is pointed at, in plotly's markup."""
    run = entry.any_run
    lines = [f"<b>{_for_plotly(entry.label)}</b>", f"<i>{_for_plotly(run.family)}</i>"]
    if entry.score is not None:
        line = comparison.show(entry.score)
        if entry.interval is not None:
            low, high = (comparison.show(end) for end in entry.interval)
            line += f" ({low} to {high})"
        lines.append(f"{line}, rank {comparison.rank(entry)}")
    share = show_share(run.counts.trainable, run.model.parameters)
    lines.append(f"{show_count(run.counts.trainable)} trainable" + (f", {share}" if share else ""))
    if entry.peak_memory_bytes is not None:
        lines.append(f"{show_bytes(entry.peak_memory_bytes)} peak memory")
    if entry.training_seconds is not None:
        lines.append(f"{show_seconds(entry.training_seconds)} training")
    if entry.inference_samples_per_second is not None:
        lines.append(f"{show_speed(entry.inference_samples_per_second)} samples/s inference")
    return "<br>".join(lines)
