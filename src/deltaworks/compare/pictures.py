"""What the methods did while they trained, as pictures: the ``details`` of the records, whatever method they are of.

Numbers by layer become bars, or a map of part by block where they are many; numbers over time become lines, or a map
of layer by step. Here is only what stands where, in pixels of a picture that is ``WIDTH`` wide; the template draws it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaworks.compare.colours import Look
from deltaworks.compare.standings import Comparison
from deltaworks.compare.wording import plural, show_count
from deltaworks.store.records import Record

WIDTH, LEFT, RIGHT, TOP = 340.0, 146.0, 10.0, 6.0
_ROW, _TEXT = 14.0, 11.0  # height of a row at most, and what a line of text needs
_LINES, _BARS, _ROWS, _COLUMNS = 4, 16, 60, 80  # more than these are drawn otherwise, or gathered
_UNITS = {"percent": "%", "bytes": "bytes", "seconds": "s"}
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Box:
    """A bar, or a cell of a map; ``strength`` is how much of the method's colour it has."""

    x: float
    y: float
    width: float
    height: float
    strength: float
    tip: str


@dataclass
class Picture:
    """One picture, and in words what it shows."""

    title: str
    about: str
    height: float = 0.0
    boxes: list[Box] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)  # points "x,y x,y", dashes
    rules: list[tuple[float, float, float, float]] = field(default_factory=list)  # x, y to x, y
    texts: list[tuple[float, float, str, str]] = field(default_factory=list)  # x, y, anchor, text


@dataclass(frozen=True)
class Deeds:
    """What one run tells: single numbers by name, and pictures."""

    seed: int
    numbers: list[tuple[str, str]]
    pictures: list[Picture]


def procedures(comparison: Comparison, looks: Sequence[Look]) -> list[tuple[str, int, list[Deeds]]]:
    """Label, colour number and the deeds of its runs, for each entry that has any to tell."""
    told = [
        (entry.label, look.colour, [each for run in entry.runs if (each := deeds(run))])
        for entry, look in zip(comparison.entries, looks, strict=True)
    ]
    return [each for each in told if each[2]]


def deeds(run: Record) -> Deeds | None:
    """What the details of a run show; None where there is nothing that a picture or a number could."""
    titles, details = titles_of(run), dict[str, Any](run.details)
    numbers = [(titles[key], shown(value)) for key, value in details.items() if is_number(value)]
    drawn = [each for key, value in details.items() for each in pictures(titles[key], value)]
    return Deeds(run.seed, numbers, drawn) if numbers or drawn else None


def pictures(title: str, value: Any) -> list[Picture]:
    """Numbers by layer, or over time, as pictures; none for anything else."""
    if not isinstance(value, dict) or not value:
        return []
    if value.keys() != {"steps", "values"}:
        fits = all(each is None or is_number(each) for each in value.values()) and known(value.values())
        return [by_block(title, value) or bars(title, value)] if fits else []
    steps, rows = value["steps"], value["values"]
    if not (isinstance(steps, list) and steps and all(map(is_number, steps)) and isinstance(rows, dict)):
        return []
    if not all(isinstance(row, list) and len(row) == len(steps) for row in rows.values()):
        return []
    if not known(each for row in rows.values() for each in row):
        return []
    stride = math.ceil(len(steps) / _COLUMNS)
    kept = range((len(steps) - 1) % stride, len(steps), stride)  # the last one is among them
    steps, rows = [steps[at] for at in kept], {name: [row[at] for at in kept] for name, row in rows.items()}
    if len(rows) <= _LINES:
        return [lines(title, steps, rows)]
    last = {name: row[-1] for name, row in rows.items()}
    parts = by_block(f"{title} at the end", last) if len(rows) > _ROWS and known(last.values()) else None
    return [heat(title, steps, rows), *([parts] if parts else [])]


def titles_of(run: Record) -> dict[str, str]:
    """Keys as headings: without the method's name where all have the same one, with the unit in brackets."""
    methods = sorted({name.replace("-", "_") for name in re.findall(r"[a-z][a-z0-9-]*", run.method)}, key=len)
    owners = {key: next((m for m in reversed(methods) if key.startswith(f"{m}_")), "") for key in run.details}
    titles = {}
    for key, owner in owners.items():
        words = (key.removeprefix(f"{owner}_") if owner else key).split("_")
        unit = f" ({_UNITS[words.pop()]})" if len(words) > 1 and words[-1] in _UNITS else ""
        text = " ".join(words)
        text = f"{owner.replace('_', '-')}: {text}" if len(set(owners.values())) > 1 and owner else text
        titles[key] = text[:1].upper() + text[1:] + unit
    return titles


# ---- kinds of pictures ----------------------------------------------------------------------------------


def bars(title: str, values: Numbers) -> Picture:
    """A bar for each name, with its number."""
    rows = gathered({name: [value] for name, value in values.items()})
    found = known(value for (value,) in rows.values())
    drawn = Picture(title, f"{plural(len(values), 'bar')}: {reach(found)}{total(values.values())}")
    low, high = min(0.0, *found), max(0.0, *found)
    room = WIDTH - LEFT - RIGHT - 36  # the numbers stand behind the bars
    scale = room / ((high - low) or 1.0)
    zero, height = LEFT - low * scale, row_height(len(rows))
    for index, (name, (value,)) in enumerate(rows.items()):
        if value is not None:
            y, end = TOP + index * height, zero + value * scale
            drawn.boxes.append(
                Box(min(zero, end), y, abs(end - zero), height * 0.78, 0.85, f"{name or title}: {shown(value)}")
            )
            if height >= _TEXT:
                drawn.texts.append((max(zero, end) + 4, y + height * 0.39, "start", brief(value)))
    drawn.rules.append((zero, TOP - 3, zero, TOP + len(rows) * height))
    return finished(drawn, list(rows), height)


def by_block(title: str, values: Numbers) -> Picture | None:
    """Many numbers as a map, a row for each part and a column for each block; None where there are no blocks."""
    places = {name: block_of(name) for name in values}
    stacks = {place[0] for place in places.values() if place}
    rows: dict[str, dict[int, float | None]] = {}
    for name, place in places.items():
        stack, column, rest = place or ("", -1, name)
        rows.setdefault(f"{stack}: {rest}" if place and len(stacks) > 1 else rest, {})[column] = values[name]
    columns = sorted({column for row in rows.values() for column in row})
    if len(values) <= _BARS or len(stacks) == 0 or 2 * len(rows) > len(values) or len(columns) > _COLUMNS:
        return None
    drawn = Picture(title, f"A map of {plural(len(rows), 'part')} in {plural(sum(c >= 0 for c in columns), 'block')}: ")
    drawn.about += reach(known(values.values())) + total(values.values())
    heads = ["–" if column < 0 else str(column) for column in columns]
    table = {part: [row.get(column) for column in columns] for part, row in rows.items()}
    return map_of(drawn, heads, table, "block" if columns[0] >= 0 else "block (–: none)", "block")


def heat(title: str, steps: Sequence[float], rows: Mapping[str, Sequence[float | None]]) -> Picture:
    """A map with a row for each name and a column for each step."""
    drawn = Picture(title, f"A map of {len(rows)} rows over {over(steps)}: {course(rows)}")
    return map_of(drawn, [shown(step) for step in steps], gathered(rows), "step", "step")


def lines(title: str, steps: Sequence[float], rows: Mapping[str, Sequence[float | None]]) -> Picture:
    """A line for each name over the steps."""
    several = len(rows) > 1
    drawn = Picture(title, f"{f'{len(rows)} lines' if several else 'A line'} over {over(steps)}: {course(rows)}")
    found = known(value for row in rows.values() for value in row)
    marks = ticks(min(found), max(found))
    digits = min(9, max(0, -math.floor(math.log10(marks[1] - marks[0]))))
    low, high = min(marks[0], *found), max(marks[-1], *found)
    left, top, width, height = 48.0, TOP + 4, WIDTH - 48 - RIGHT - 4, 150.0

    def at(step: float, value: float) -> tuple[float, float]:
        along = (step - steps[0]) / ((steps[-1] - steps[0]) or 1)
        return left + width * along, top + height * (1 - (value - low) / ((high - low) or 1))

    for mark in marks:
        y = at(steps[0], mark)[1]
        drawn.rules.append((left, y, left + width, y))
        drawn.texts.append((left - 6, y, "end", brief(mark) if abs(mark) >= 1000 else f"{mark:.{digits}f}"))
    ends = [(steps[0], "start"), (steps[len(steps) // 2], "middle"), (steps[-1], "end")]
    for step, anchor in ends[:: 1 if len(steps) > 4 else 2] if len(steps) > 1 else ends[:1]:
        drawn.texts.append((at(step, low)[0], top + height + 12, anchor, shown(step)))
    drawn.texts.append((left + width / 2, top + height + 26, "middle", "step"))
    drawn.height = top + height + 34
    for index, ((name, row), dash) in enumerate(zip(rows.items(), _DASHES, strict=False)):
        there = [(step, value) for step, value in zip(steps, row, strict=True) if value is not None]
        drawn.lines.append((path([at(*each) for each in there]), dash))
        for step, value in there:
            (x, y), tip = at(step, value), f"{name or title}, step {shown(step)}: {shown(value)}"
            drawn.boxes.append(Box(x - 2, y - 2, 4, 4, 1.0 if len(there) < 12 else 0.0, tip))
        if several:  # what the dashes mean, below
            y = drawn.height + 6 + index * _ROW
            drawn.lines.append((path([(left, y), (left + 30, y)]), dash))
            drawn.texts.append((left + 38, y, "start", name))
    drawn.height += len(rows) * _ROW if several else 0
    return drawn


def map_of(
    drawn: Picture, heads: Sequence[str], rows: Mapping[str, Sequence[float | None]], axis: str, unit: str
) -> Picture:
    """Cells of the colour, the stronger the larger the number; equal neighbours are one cell."""
    found = known(value for row in rows.values() for value in row)
    low, high = min(found), max(found)
    low = 0.0 if 0 <= low <= high / 2 else low
    positive = sorted(value for value in found if value > 0)
    uneven = low == 0 and len(positive) > 0 and high > 30 * positive[len(positive) // 2]
    bend = math.log1p if uneven else float
    width, height = (WIDTH - LEFT - RIGHT) / len(heads), row_height(len(rows))

    def strength(value: float) -> float:
        if value == 0 == low:
            return 0.0
        return 0.1 + 0.9 * (bend(value - low) / bend(high - low) if high > low else 1.0)

    for index, (name, row) in enumerate(rows.items()):
        start = 0
        for column in range(1, len(heads) + 1):
            if column < len(heads) and row[column] == row[start]:
                continue
            value = row[start]
            span = heads[start] if column - start == 1 else f"{heads[start]} to {heads[column - 1]}"
            if value is not None:
                place = (LEFT + start * width, TOP + index * height, (column - start) * width, height)
                gap = 1.0 if height > 6 else 0.0
                size = (place[2] - (1.0 if width > 6 else 0.0), place[3] - gap)
                drawn.boxes.append(Box(*place[:2], *size, strength(value), f"{name}, {unit} {span}: {shown(value)}"))
            start = column
    bottom = TOP + len(rows) * height
    every = max(1, math.ceil(len(heads) * (8 + 5.5 * max(map(len, heads))) / (WIDTH - LEFT - RIGHT)))
    for column in range(0, len(heads), every):
        drawn.texts.append((LEFT + (column + 0.5) * width, bottom + 9, "middle", heads[column]))
    foot = bottom + 24
    drawn.texts.append((LEFT, foot, "start", axis))
    x = WIDTH - RIGHT - 78
    drawn.texts += [(x - 4, foot, "end", brief(low)), (x + 54, foot, "start", brief(high))]
    if uneven:
        drawn.texts.append((x + 25, foot + 12, "middle", "log scale"))
    for part in range(5):
        drawn.boxes.append(Box(x + 10 * part, foot - 4, 10, 8, 0.1 + 0.9 * part / 4, "scale of the colour"))
    finished(drawn, list(rows), height)
    drawn.height = foot + (20 if uneven else 10)
    return drawn


# ---- parts of pictures ----------------------------------------------------------------------------------


def finished(drawn: Picture, names: Sequence[str], height: float) -> Picture:
    """The names at the left, as many as there is room for."""
    every = math.ceil(_TEXT / height)
    short = short_names(names)
    drawn.texts += [
        (LEFT - 6, TOP + (index + 0.45) * height, "end", short[index]) for index in range(0, len(names), every)
    ]
    drawn.height = TOP + len(names) * height + 4
    return drawn


def row_height(rows: int) -> float:
    return max(3.5, min(_ROW, 420 / rows))


def block_of(name: str) -> tuple[str, int, str] | None:
    """The stack, the number of the block, and the rest of a name such as ``encoder.layer.3.output.dense``."""
    found = re.match(r"(?:(.*?)\.)??(\d{1,6})(?:\.(.*))?$", name)
    return (found[1] or "", int(found[2]), found[3] or "") if found else None


def short_names(names: Sequence[str], most: int = 24) -> list[str]:
    """Names without the parts that all begin or end with; of long ones the number of the block and the end."""
    parts = [re.sub(r"<\d+>", "", name).split(".") for name in names]  # which part of a composed method is left out
    for _ in range(2):  # from the left, then, turned around, from the right
        while len(parts) > 1 and all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
            parts = [each[1:] for each in parts]
        parts = [each[::-1] for each in parts]
    short = []
    for each in parts:
        block = each[0] if each[0].isdecimal() and len(each[0]) < 4 else ""
        name = re.sub(r"^(\d+( \(mean\))?)$", r"block \1", ".".join(each))
        short.append(name if len(name) <= most else f"{block}…{name[1 + len(block) - most :]}")
    return short


def gathered(rows: Mapping[str, Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    """Rows as they are; of more than there is room for, the means of blocks, or else of neighbours."""
    if len(rows) <= _ROWS:
        return dict(rows)
    places, width = {name: block_of(name) for name in rows}, math.ceil(len(rows) / _ROWS)
    groups: dict[str, list[Sequence[float | None]]] = {}
    for name, place in places.items():
        groups.setdefault(f"{place[0]}.{place[1]}" if place else name, []).append(rows[name])
    if len(groups) > _ROWS:
        names, groups = list(rows), {}
        for index, name in enumerate(names):
            groups.setdefault(f"{names[index - index % width]} and on", []).append(rows[name])
    means: dict[str, Sequence[float | None]] = {}
    for name, group in groups.items():
        columns = [known(column) for column in zip(*group, strict=True)]
        means[f"{name} (mean)" if len(group) > 1 else name] = [sum(c) / len(c) if c else None for c in columns]
    return means


def path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers from below ``low`` to above ``high``."""
    low, high = (0.0 if 0 <= low <= high / 2 else low), max(high, low)
    span = (high - low) or abs(high) or 1.0
    rough = span / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * mark for mark in range(first, max(last, first + 1) + 1)]


# ---- numbers and words ----------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def known(values: Any) -> list[float]:
    """The numbers among the values."""
    return [value for value in values if is_number(value)]


def shown(value: float) -> str:
    """A number in full: 12,345 or 0.0123."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def brief(value: float) -> str:
    """A number in a few letters: 12.3 K or 0.012."""
    return f"{value:.2g}" if abs(value) < 10 else ("-" if value < 0 else "") + show_count(abs(value))


def reach(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return shown(low) if low == high else f"{shown(low)} to {shown(high)}"


def total(values: Any) -> str:
    """The sum, where it is one of counts."""
    found = known(values)
    return f", {sum(found):,} in all" if all(isinstance(value, int) for value in found) else ""


def over(steps: Sequence[float]) -> str:
    return f"step {shown(steps[0])}" if len(steps) == 1 else f"steps {shown(steps[0])} to {shown(steps[-1])}"


def course(rows: Mapping[str, Sequence[float | None]]) -> str:
    """What the values are at the first and at the last step."""
    ends = [known(row[at] for row in rows.values()) for at in (0, -1)]
    told = [reach(values) if values else "nothing" for values in ends]
    return f"at first {told[0]}, at last {told[1]}"
