"""Several comparisons at a glance: the methods by their ranks on each model and data set."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from deltaworks.compare.colours import COLOURS, family_colours
from deltaworks.compare.standings import Comparison


@dataclass
class Line:
    """One method: its mean rank, and for each comparison its rank and its score as it is shown, None where lost."""

    label: str
    colour: int
    baseline: bool
    mean_rank: float | None
    places: list[tuple[int, str] | None]


def overview(comparisons: Sequence[Comparison]) -> list[Line]:
    """A line for each method, the best mean rank first, then the best mean place by score; those lost somewhere last.

    Methods of several comparisons are the same where their labels are.
    """
    found = [{entry.label: entry for entry in comparison.entries} for comparison in comparisons]
    entries = {label: entry for each in reversed(found) for label, entry in each.items()}
    families = {label: "baseline" if entry.baseline else entry.any_run.family for label, entry in entries.items()}
    looks = family_colours(list(families.values()))
    orders = [{entry.label: place for place, entry in enumerate(comparison.scored)} for comparison in comparisons]
    lines = []
    for label, entry in entries.items():
        places: list[tuple[int, str] | None] = []
        for comparison, here in zip(comparisons, found, strict=True):
            rank = comparison.rank(here[label]) if label in here else None
            score = here[label].score if label in here else None
            places.append(None if rank is None or score is None else (rank, comparison.show(score)))
        ranks = [place[0] for place in places if place is not None]
        colour = looks[families[label]].colour if entry.baseline is None else COLOURS - 1
        lines.append(
            Line(label, colour, entry.baseline is not None, statistics.fmean(ranks) if ranks else None, places)
        )

    def order(line: Line) -> tuple[bool, float, float]:
        scored = [places[line.label] for places in orders if line.label in places]
        return None in line.places, line.mean_rank or 0.0, statistics.fmean(scored) if scored else 0.0

    return sorted(lines, key=order)
