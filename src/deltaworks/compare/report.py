"""The page a person looks at: one HTML file, made from the records alone, that needs no network."""

import hashlib
import html
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from deltaworks.compare.records import CurvePoint, Record, read_records
from deltaworks.compare.standings import Comparison, Entry, compare, score_of
from deltaworks.compare.verdict import caveats, findings
from deltaworks.compare.wording import plural, show_bytes, show_count, show_seconds, show_share, three_digits
from deltaworks.core.errors import UserError
from deltaworks.store.files import write_atomically

# More points than this on a line cannot be seen on a screen.
_CURVE_POINTS = 240

_KNOWN_FAMILIES = {"additive": 0, "selective": 1, "reparametrized": 2, "hybrid": 3, "mixture": 4}
_COLOURS = 8
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "triangle-down", "x")


_CURVES = (("validation", "Validation score while training"), ("loss", "Training loss"))


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
    colour: str
    leads: bool
    first: bool
    baseline: bool
    cells: list[Cell]
    scale: tuple[float, float, float] | None


@dataclass
class Setting:
    """All facts of one run, for the section of details."""

    title: str
    status: str
    summary: str
    message: str
    facts: list[tuple[str, str]]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Read the records in ``folder/records`` and write ``folder/report.html``, a page that stands alone.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no records, one is broken, or the page cannot be written.
    """
    place = Path(folder)
    records = read_records(place / "records")
    if not records:
        raise UserError(f"there is nothing to report: {str(place / 'records')!r} holds no record")
    path = place / "report.html"
    write_atomically(path, render(records))
    return path


def render(records: Sequence[Record]) -> str:
    """The page for ``records`` as HTML."""
    import jinja2  # heavy parts load when used
    from plotly.offline import get_plotlyjs

    template = resources.files("deltaworks.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [section(comparison) for comparison in compare(records)]
    fingerprint = "".join(record.model_dump_json() for record in records)
    return environment.from_string(template).render(
        title=_title(sections),
        sections=sections,
        data=[found["plots"] for found in sections],
        plotly=get_plotlyjs(),
        # Only scripts with this word run; a text in a record cannot hold the digest of itself.
        nonce=hashlib.sha256(fingerprint.encode("utf-8", "surrogatepass")).hexdigest(),
        colours=_COLOURS,
    )


def _title(sections: Sequence[dict[str, Any]]) -> str:
    if len(sections) == 1:
        return f"{sections[0]['title']} · deltaworks"
    return f"{len(sections)} comparisons · deltaworks"


def section(comparison: Comparison) -> dict[str, Any]:
    """What the template shows of one comparison."""
    run = comparison.any_run
    families = family_colours([_family(entry) for entry in comparison.entries])
    rows, drawn = table(comparison, families), plots(comparison, families)
    methods = sum(entry.baseline is None for entry in comparison.entries)
    baselines = len(comparison.entries) - methods
    count = plural(methods, "method") if methods else plural(baselines, "baseline")
    seeds = sorted({found.seed for found in comparison.records})
    lead, *others = findings(comparison)
    return {
        "title": f"{count} on {run.data.name}",
        "subtitle": _subtitle(comparison, len(seeds)),
        "seeds": len(seeds),
        "lead": lead,
        "findings": others,
        "caveats": caveats(comparison),
        "higher": comparison.entries[0].higher_is_better,
        "columns": _columns(comparison),
        "rows": rows,
        "head": show_count(max(found.counts.head for found in comparison.records)),
        "families": _legend(comparison, families),
        "plots": drawn,
        "curves": [(kind, heading) for kind, heading in _CURVES if _has_curve(drawn, kind)],
        "lost": [
            (entry.label, found.seed, found.status, found.message or "no message was left")
            for entry in comparison.entries
            for found in entry.unfinished
        ],
        "settings": [_setting(entry, found) for entry in comparison.entries for found in _all_runs(entry)],
        "facts": _facts(comparison),
    }


def _has_curve(drawn: dict[str, Any], kind: str) -> bool:
    return any(point["curve"][kind][0] for point in drawn["points"])


def _all_runs(entry: Entry) -> list[Record]:
    return sorted([*entry.runs, *entry.unfinished], key=lambda run: run.seed)


def _subtitle(comparison: Comparison, seeds: int) -> list[str]:
    run = comparison.any_run
    parts = [f"{run.model.id}, {show_count(run.model.parameters)} parameters", run.data.task]
    if run.data.labels:
        parts.append(plural(len(run.data.labels), "label"))
    steps = {found.steps for found in comparison.records}
    if len(steps) == 1:
        parts.append(f"{plural(run.steps, 'step')} of {run.batch_size}")
    return [*parts, plural(len(comparison.records), "run"), plural(seeds, "seed")]


# ------------------------------------------------------------------------------------------- families


def family_colours(families: Sequence[str]) -> dict[str, tuple[str, int, str]]:
    """For each family its group, the group's colour number and a plot symbol.

    The group is the top of the taxonomy path, or the level below where all methods share the top.
    """
    methods = sorted({family for family in families if _top(family) != "baseline"})
    depth = 1 if len({_top(family) for family in methods}) > 1 else 2
    groups = sorted({_group(family, depth) for family in methods})
    free = iter(number % (_COLOURS - 1) for number in range(len(_KNOWN_FAMILIES), 10_000))
    if depth == 2:
        numbers = {group: position % (_COLOURS - 1) for position, group in enumerate(groups)}
    else:
        numbers = {group: _KNOWN_FAMILIES[group] if group in _KNOWN_FAMILIES else next(free) for group in groups}
    found = {}
    for group in groups:
        members = [family for family in methods if _group(family, depth) == group]
        for position, family in enumerate(members):
            found[family] = (group, numbers[group], _SYMBOLS[position % len(_SYMBOLS)])
    for family in set(families) - set(methods):
        found[family] = ("baseline", _COLOURS - 1, "circle-open")
    return found


def _family(entry: Entry) -> str:
    return "baseline" if entry.baseline else entry.any_run.family


def _top(family: str) -> str:
    top = family.split("/", 1)[0].strip() or "other"
    return "baseline" if top in ("baseline", "baselines", "reference") else top


def _group(family: str, depth: int) -> str:
    parts = [part for part in family.split("/") if part] or ["other"]
    return parts[min(depth, len(parts)) - 1]


def _legend(comparison: Comparison, families: dict[str, tuple[str, int, str]]) -> list[tuple[str, int, int]]:
    """Group, colour number and number of entries, in the order of the colours."""
    counts: dict[tuple[str, int], int] = {}
    for entry in comparison.entries:
        group, colour, _ = families[_family(entry)]
        counts[group, colour] = counts.get((group, colour), 0) + 1
    return [(group, colour, count) for (group, colour), count in sorted(counts.items(), key=lambda i: i[0][1])]


# ---------------------------------------------------------------------------------------------- table


def _columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Heading, its explanation, and the order of the first click."""
    measure = f"{comparison.split.capitalize()} {comparison.metric}"
    includes = comparison.any_run.peak_memory_includes
    first = "descending" if not comparison.entries or comparison.entries[0].higher_is_better else "ascending"
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


def table(comparison: Comparison, families: dict[str, tuple[str, int, str]]) -> list[Row]:
    """The rows of the table, best first, with the best value of each column marked."""
    low, high = _range(comparison)
    leaders = {id(entry) for entry in comparison.leaders}
    rows = []
    for index, entry in enumerate(comparison.entries):
        run = entry.any_run
        group, colour, _ = families[_family(entry)]
        scale = None
        if entry.score is not None:
            ends = entry.interval or (entry.score, entry.score)
            scale = tuple(round(100 * (end - low) / (high - low), 2) for end in (ends[0], entry.score, ends[1]))
        rows.append(
            Row(
                index=index,
                label=entry.label,
                spec="" if entry.baseline else _spec_below(run.method, entry.label),
                family="" if entry.baseline else run.family or group,
                colour=str(colour),
                leads=id(entry) in leaders and len(comparison.candidates) > 1,
                first=entry is comparison.candidates[0] if comparison.candidates else False,
                baseline=entry.baseline is not None,
                cells=_cells(comparison, entry),
                scale=scale,  # type: ignore[arg-type]
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
    run = entry.any_run
    whole = run.model.parameters
    rates = sorted({found.learning_rate for found in entry.runs if found.learning_rate is not None})
    finished, all_runs = len(entry.runs), len(entry.runs) + len(entry.unfinished)
    if entry.score is None:
        score = Cell(_worst_status(entry), None)
    else:
        ends = entry.interval
        note = f"{comparison.show(ends[0])} to {comparison.show(ends[1])}" if ends else "no interval"
        score = Cell(comparison.show(entry.score), entry.score, note.replace(" % to", " to"))
    speeds = (entry.training_samples_per_second, entry.inference_samples_per_second)
    return [
        score,
        Cell(show_count(run.counts.trainable), run.counts.trainable, show_share(run.counts.trainable, whole)),
        Cell(show_bytes(run.counts.stored_bytes), run.counts.stored_bytes),
        _measured(entry.peak_memory_bytes, show_bytes),
        _measured(entry.wall_seconds, show_seconds),
        *(_measured(speed, _show_speed) for speed in speeds),
        _rates(rates),
        Cell(str(finished) if finished == all_runs else f"{finished} of {all_runs}", finished),
    ]


def _worst_status(entry: Entry) -> str:
    statuses = [run.status for run in entry.unfinished]
    return next((word for word in ("diverged", "failed", "interrupted") if word in statuses), "no score")


def _measured(value: float | None, show: Any) -> Cell:
    return Cell("–", None) if value is None else Cell(show(value), value)


def _show_speed(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 1000 else three_digits(speed)


def _rates(rates: Sequence[float]) -> Cell:
    """The chosen learning rates of the seeds, sorted: one, or the ends of their range."""
    if not rates:
        return Cell("–", None)
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
    for column, highest in ((1, False), (2, False), (3, False), (4, False), (5, True), (6, True)):
        values = [value for row in field if (value := row.cells[column].value) is not None]
        if len(set(values)) < 2:
            continue
        best = max(values) if highest else min(values)
        for row in field:
            row.cells[column].best = row.cells[column].value == best


# ---------------------------------------------------------------------------------------------- plots


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats (lower cost, higher gain), from cheap to dear."""
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -gains[index], index))
    front: list[int] = []
    for index in order:
        if not front or gains[index] > gains[front[-1]]:
            front.append(index)
    return front


def plots(comparison: Comparison, families: dict[str, tuple[str, int, str]]) -> dict[str, Any]:
    """The data of the plots as JSON can hold it; the page draws them."""
    proportion = bool(comparison.scored) and all(entry.is_proportion for entry in comparison.scored)
    factor = 100 if proportion else 1
    leaders = {id(entry) for entry in comparison.leaders}
    points = []
    for index, entry in enumerate(comparison.entries):
        group, colour, symbol = families[_family(entry)]
        points.append(
            {
                "row": index,
                "label": _for_plotly(entry.label),
                "group": group,
                "colour": colour,
                "symbol": symbol,
                "leads": id(entry) in leaders,
                "baseline": entry.baseline,
                "score": None if entry.score is None else factor * entry.score,
                "interval": None if entry.interval is None else [factor * end for end in entry.interval],
                "hover": _hover(comparison, entry),
                "curve": _curves(entry, factor),
            }
        )
    measure = f"{comparison.split} {comparison.metric}" + (" (%)" if proportion else "")
    scatters = [_scatter(comparison, *axis) for axis in _AXES]
    return {
        "measure": _for_plotly(measure),
        "validation": _for_plotly(
            f"validation {comparison.metric}" + (" (%)" if proportion else "") if comparison.metric else "score"
        ),
        "points": points,
        "scatters": [scatter for scatter in scatters if scatter is not None],
    }


_AXES: list[tuple[str, str, str, float, bool]] = [
    # title, axis label, attribute, divisor to the axis unit, whether more is better
    ("Score and size", "trainable parameters", "trainable", 1.0, False),
    ("Score and memory", "peak memory", "peak_memory_bytes", 1.0, False),
    ("Score and training time", "training time", "wall_seconds", 1.0, False),
    ("Score and inference speed", "inference samples per second", "inference_samples_per_second", 1.0, True),
]


def _cost(entry: Entry, attribute: str) -> float | None:
    if attribute == "trainable":
        return float(entry.any_run.counts.trainable)
    value: float | None = getattr(entry, attribute)
    return value


def _scatter(
    comparison: Comparison, title: str, axis: str, attribute: str, divisor: float, more_is_better: bool
) -> dict[str, Any] | None:
    """One plot of score against a cost; None where no run measured it."""
    logarithmic = attribute == "trainable"
    known = [
        (index, cost)
        for index, entry in enumerate(comparison.entries)
        if entry.score is not None and (cost := _cost(entry, attribute)) is not None and (cost > 0 or not logarithmic)
    ]
    if not known:
        return None
    costs = [cost for _, cost in known]
    if attribute == "peak_memory_bytes":
        divisor, unit = next(
            ((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if max(costs) >= size), (1.0, "bytes")
        )
        axis = f"{axis} ({unit})"
    if attribute == "wall_seconds":
        longest = max(costs)
        divisor, unit = (3600.0, "h") if longest >= 7200 else (60.0, "min") if longest >= 300 else (1.0, "s")
        axis = f"{axis} ({unit})"
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        logarithmic = True
    if logarithmic:
        axis += ", log scale"
    sign = 1.0 if comparison.entries[0].higher_is_better else -1.0
    gains = [sign * (comparison.entries[index].score or 0.0) for index, _ in known]
    front = pareto_front([-cost if more_is_better else cost for cost in costs], gains)
    front = sorted(front, key=lambda position: costs[position])
    return {
        "title": title,
        "axis": axis,
        "logarithmic": logarithmic,
        "rows": [index for index, _ in known],
        "costs": [cost / divisor for cost in costs],
        "front": [known[position][0] for position in front],
        "more_is_better": more_is_better,
        "unplaced": [
            index
            for index, entry in enumerate(comparison.entries)
            if attribute == "trainable" and entry.score is not None and _cost(entry, attribute) == 0
        ],
    }


def _curves(entry: Entry, factor: float) -> dict[str, list[list[float]]]:
    """Mean over the seeds of training loss and validation score: [steps, values] each."""
    runs = [run.curve for run in entry.runs] or [run.curve for run in entry.unfinished]
    loss = _mean_curve([[(point.step, point.loss) for point in curve] for curve in runs])
    score = _mean_curve([[(point.step, _scaled(point, factor)) for point in curve] for curve in runs])
    return {"loss": loss, "validation": score}


def _scaled(point: CurvePoint, factor: float) -> float | None:
    return None if point.validation is None else factor * point.validation


def _mean_curve(curves: Sequence[Sequence[tuple[int, float | None]]]) -> list[list[float]]:
    """Values averaged over the seeds at the steps all seeds have, thinned to what a screen can show."""
    by_seed = [{step: value for step, value in curve if value is not None} for curve in curves]
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
        lines.append(line)
    share = show_share(run.counts.trainable, run.model.parameters)
    lines.append(f"{show_count(run.counts.trainable)} trainable" + (f", {share}" if share else ""))
    if entry.peak_memory_bytes is not None:
        lines.append(f"{show_bytes(entry.peak_memory_bytes)} peak memory")
    if entry.wall_seconds is not None:
        lines.append(f"{show_seconds(entry.wall_seconds)} training")
    if entry.inference_samples_per_second is not None:
        lines.append(f"{_show_speed(entry.inference_samples_per_second)} samples/s inference")
    return "<br>".join(lines)


# ------------------------------------------------------------------------------------- settings, facts


def _setting(entry: Entry, run: Record) -> Setting:
    score = score_of(run, entry.split)
    summary = run.status if score is None or run.status != "finished" else f"{entry.split} score {score:.4g}"
    counts = run.counts
    facts = [
        ("Run", run.run_id),
        ("Method", run.method),
        ("Family", run.family),
        ("Paper", run.paper),
        ("Targets", f"{run.targets} ({plural(run.sites, 'site')})" if run.targets or run.sites else ""),
        (
            "Counts",
            f"{counts.trainable:,} trainable, {counts.changed:,} changed, {counts.head:,} in the head, "
            f"{counts.stored_bytes:,} bytes stored",
        ),
        (
            "Rank of the change",
            "; ".join(f"{role}: median {rank.median:g}, max {rank.max:g}" for role, rank in sorted(run.rank.items())),
        ),
        ("Types", _pairs(run.dtypes)),
        ("Optimizer", run.optimizer),
        (
            "Learning rates",
            ", ".join(
                f"{trial.rate:g} → {'diverged' if trial.score is None else f'{trial.score:.4g}'}"
                for trial in run.learning_rates
            ),
        ),
        (
            "Chosen rate",
            ""
            if run.learning_rate is None
            else f"{run.learning_rate:g}"
            + (f", on the {run.learning_rate_split} split" if run.learning_rate_split else ""),
        ),
        (
            "Schedule",
            f"{plural(run.steps, 'step')}, batch size {run.batch_size}, {plural(run.examples, 'example')}"
            + (f", {run.epochs:g} epochs" if run.epochs is not None else "")
            + f", seed {run.seed}",
        ),
        (
            "Validation",
            ", ".join(
                f"{name} {value:.4g}"
                for name, value in (("last", run.validation.last), ("best", run.validation.best))
                if value is not None
            ),
        ),
        (
            "Peak memory",
            ""
            if run.peak_memory_bytes is None
            else show_bytes(run.peak_memory_bytes)
            + (f" ({run.peak_memory_includes})" if run.peak_memory_includes else ""),
        ),
        ("Saved activations", "" if run.saved_activation_bytes is None else show_bytes(run.saved_activation_bytes)),
        ("Tokens per second", _speeds(run)),
        ("Merge error", "" if run.merge_error is None else f"{run.merge_error:.2g} (largest output difference)"),
        ("Started", run.started.isoformat(sep=" ", timespec="seconds") if run.started else ""),
        ("Finished", run.finished.isoformat(sep=" ", timespec="seconds") if run.finished else ""),
        ("Configuration", _json(run.config)),
        ("Details", _json(run.details)),
    ]
    return Setting(
        title=f"{entry.label}, seed {run.seed}",
        status=run.status,
        summary=summary,
        message=run.message,
        facts=[(name, value) for name, value in facts if value],
    )


def _speeds(run: Record) -> str:
    found = (
        ("training", run.training_tokens_per_second),
        ("inference", run.inference_tokens_per_second),
    )
    return ", ".join(f"{value:,.0f} in {name}" for name, value in found if value is not None)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) if values else ""


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What all runs share; where they differ, all values."""
    run = comparison.any_run

    def each(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value))

    runs = comparison.records
    facts = [
        ("Model", f"{run.model.id}, {run.model.parameters:,} parameters"),
        ("Data", f"{run.data.name}, digest {run.data.digest}"),
        ("Task", run.data.task),
        ("Examples", ", ".join(f"{size:,} {split}" for split, size in run.data.sizes.items())),
        ("Labels", _labels(run.data.labels)),
        ("Head", f"{run.counts.head:,} values, trained with every method" if run.counts.head else ""),
        ("Optimizer", each([found.optimizer for found in runs])),
        ("Learning rate chosen on", each([found.learning_rate_split for found in runs])),
        ("Memory includes", each([found.peak_memory_includes for found in runs])),
        ("Hardware", each([found.hardware for found in runs])),
        ("Versions", each([_pairs(found.versions) for found in runs])),
    ]
    return [(name, value) for name, value in facts if value]


def _labels(labels: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(labels[:limit])
    return f"{shown} and {len(labels) - limit} more" if len(labels) > limit else shown
