"""How an entry looks in the table and the plots: a colour for its group of families, a symbol for its family.

The families that are known keep their colour whoever else is on the page, so that two reports can be laid side by
side; the last colour is that of the baselines.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from deltaworks.compare.standings import Comparison

COLOURS = 8
_BASELINE = "baseline"
_KNOWN = {"additive": 0, "selective": 1, "reparametrized": 2, "hybrid": 3, "mixture": 4}
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "triangle-down", "x")


class Look(NamedTuple):
    """The group that an entry is counted to, the group's colour number, and the plot symbol of its family."""

    group: str
    colour: int
    symbol: str


def looks_of(comparison: Comparison) -> list[Look]:
    """The look of each entry."""
    families = [_BASELINE if entry.baseline else entry.any_run.family for entry in comparison.entries]
    looks = family_colours(families)
    return [looks[family] for family in families]


def family_colours(families: Sequence[str]) -> dict[str, Look]:
    """The look of each family.

    The group is the top of the taxonomy path, or the level below where all methods share the top.
    """
    methods = sorted({family for family in families if _top(family) != _BASELINE})
    depth = 1 if len({_top(family) for family in methods}) > 1 else 2
    groups = sorted({_group(family, depth) for family in methods})
    if depth == 2:
        numbers = {group: position % (COLOURS - 1) for position, group in enumerate(groups)}
    else:
        free = (number % (COLOURS - 1) for number in count(len(_KNOWN)))
        numbers = {group: _KNOWN[group] if group in _KNOWN else next(free) for group in groups}
    looks = dict.fromkeys(families, Look(_BASELINE, COLOURS - 1, "circle-open"))
    for group in groups:
        members = [family for family in methods if _group(family, depth) == group]
        for position, family in enumerate(members):
            looks[family] = Look(group, numbers[group], _SYMBOLS[position % len(_SYMBOLS)])
    return looks


def _top(family: str) -> str:
    top = family.split("/", 1)[0].strip() or "other"
    return _BASELINE if top in ("baseline", "baselines", "reference") else top


def _group(family: str, depth: int) -> str:
    parts = [part for part in family.split("/") if part] or ["other"]
    return parts[min(depth, len(parts)) - 1]


def legend(looks: Sequence[Look]) -> list[tuple[str, int, int]]:
    """Group, colour number and number of entries, in the order of the colours."""
    counts = Counter((look.group, look.colour) for look in looks)
    return sorted(((group, colour, number) for (group, colour), number in counts.items()), key=lambda item: item[1])
