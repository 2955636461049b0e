"""What would change the answer: the nearest value of each wish at which another method or configuration comes first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from deltaworks.advise.advice import Advice, Adviser, Change, Option, sizes
from deltaworks.core.errors import UserError
from deltaworks.core.registry import configure

COUNTED = ("trials", "examples", "epochs", "adapters_served")


def changes(adviser: Adviser, advice: Advice) -> list[Change]:
    """One change at most for each wish and direction, the nearest (by ratio) first, yes and no last."""
    best = advice.options[0]
    found: list[Change] = []
    for wish, values in _values(adviser, advice):
        now = advice.facts[wish]
        for then in values:
            option = _first(adviser, advice, wish, then)
            if option is None or option.answer != best.answer:
                found.append(Change(wish, now, then, option))
                break
    return sorted(found, key=_distance)


def _values(adviser: Adviser, advice: Advice) -> Iterator[tuple[str, list[Any]]]:
    """The values of each wish at which something can change, the nearest first: upwards and downwards apart."""
    facts, best = advice.facts, advice.options[0]
    for wish in COUNTED:
        if (now := facts[wish]) is not None:
            edges = {edge for edge in adviser.book.bounds(wish) if edge >= 1}
            yield wish, sorted(edge for edge in edges if edge > now)
            yield wish, sorted((edge for edge in edges if edge < now), reverse=True)
    full = adviser.estimate(advice.wishes, "full", {"dtype": advice.wishes.dtype or "float32"})
    peaks = {full.peak_bytes, 2 * facts["parameters"], *_peaks(adviser, advice)}
    yield "memory", sorted(peak for peak in peaks if peak > facts["memory"])
    yield "memory", sorted((peak - 1 for peak in peaks if peak <= facts["memory"]), reverse=True)
    tiny = int(0.001 * 4 * facts["parameters"])
    limit = facts["storage"] or math.inf
    yield "storage", sorted((s for s in {best.stored_bytes - 1, tiny} if 0 < s < limit), reverse=True)
    if facts["storage"] is not None:
        yield "storage", sorted(size for size in {tiny + 1, *_stored(adviser, advice)} if size > limit)
    yield "merge", [not facts["merge"]]


def _peaks(adviser: Adviser, advice: Advice) -> Iterator[int]:
    """What the best option takes in its settings, and in those that save less."""
    best, wishes = advice.options[0], advice.wishes
    own = {key: value for key, value in best.settings.items() if key != "epochs"}
    for rung in adviser.rungs({"dtype": wishes.dtype, "quantize": wishes.quantize}):
        yield adviser.estimate(wishes, best.spec, rung).peak_bytes
        if rung == own:
            return


def _stored(adviser: Adviser, advice: Advice) -> Iterator[int]:
    """What the option stores that would be best without a limit, at all its sizes."""
    free = advice.wishes.model_copy(update={"storage": None})
    best = adviser.judge(free, show=1).options[0]
    for config in sizes(configure(best.spec)):
        yield adviser.estimate(free, str(config), adviser.rungs(advice.facts)[0]).stored_bytes


def _first(adviser: Adviser, advice: Advice, wish: str, then: Any) -> Option | None:
    """The best method under another wish; None where nothing fits."""
    try:
        return adviser.judge(advice.wishes.model_copy(update={wish: then}), show=1).options[0]
    except UserError:
        return None


def _distance(change: Change) -> float:
    if isinstance(change.then, bool) or not change.now:
        return math.inf
    return abs(math.log(change.then / change.now))
