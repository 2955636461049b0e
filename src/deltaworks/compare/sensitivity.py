"""How much a method cares about its learning rate: the score of each rate that was tried, a small picture a method.

All pictures of a comparison share the scale of the score, so that they can be laid side by side.
"""

import math
from collections.abc import Sequence

from deltaworks.compare.colours import Look
from deltaworks.compare.pictures import Box, Picture, path, ticks
from deltaworks.compare.standings import Comparison, Entry
from deltaworks.compare.wording import join, plural, scientific
from deltaworks.store.records import Record

WIDTH = 220.0
_LEFT, _RIGHT, _TOP, _HEIGHT = 38.0, 12.0, 8.0, 84.0
_RATES = 4  # as many labels of rates as there is room for


def sensitivity(comparison: Comparison, looks: Sequence[Look]) -> list[tuple[str, int, Picture]]:
    """Label, colour number and picture of each entry that tried several rates."""
    tried = [
        (entry, look, found)
        for entry, look in zip(comparison.entries, looks, strict=True)
        if (found := _searches(entry))
    ]
    scores = [
        trial.score for _, _, runs in tried for run in runs for trial in run.learning_rates if trial.score is not None
    ]
    if not scores:
        return []
    factor = 100 if min(scores) >= 0 and max(scores) <= 1 else 1
    marks = ticks(factor * min(scores), factor * max(scores))
    return [(entry.label, look.colour, _picture(runs, marks, factor)) for entry, look, runs in tried]


def _searches(entry: Entry) -> list[Record]:
    """The runs that tried several rates."""
    return [run for run in (*entry.runs, *entry.unfinished) if len({trial.rate for trial in run.learning_rates}) > 1]


def _picture(runs: Sequence[Record], marks: Sequence[float], factor: float) -> Picture:
    """A line for each seed, a large mark at the rate that was chosen, a cross at the foot where training diverged."""
    rates = sorted({trial.rate for run in runs for trial in run.learning_rates})
    low, high = marks[0], marks[-1]
    width = WIDTH - _LEFT - _RIGHT
    bottom = _TOP + _HEIGHT

    def x(rate: float) -> float:
        return _LEFT + width * math.log(rate / rates[0]) / math.log(rates[-1] / rates[0])

    def y(score: float) -> float:
        return _TOP + _HEIGHT * (1 - (factor * score - low) / (high - low))

    drawn = Picture("", _words(runs, factor), height=bottom + 20)
    for mark in marks:
        level = _TOP + _HEIGHT * (1 - (mark - low) / (high - low))
        drawn.rules.append((_LEFT, level, WIDTH - _RIGHT, level))
        drawn.texts.append((_LEFT - 5, level, "end", f"{float(f'{mark:.6g}'):g}"))
    every = math.ceil(len(rates) / _RATES)
    for place, rate in enumerate(rates):
        if (len(rates) - 1 - place) % every == 0:
            anchor = "start" if place == 0 else "end" if rate == rates[-1] else "middle"
            drawn.texts.append(
                (x(rate) + {"start": -8, "end": 8}.get(anchor, 0), bottom + 12, anchor, scientific(rate))
            )
    for run in runs:
        trials = sorted(run.learning_rates, key=lambda trial: trial.rate)
        whole = [trial for trial in trials if trial.score is not None and trial.stopped_at is None]
        drawn.lines.append((path([(x(trial.rate), y(trial.score or 0.0)) for trial in whole]), ""))
        for trial in trials:
            if trial.score is None:
                drawn.texts.append((x(trial.rate), bottom - 5, "middle", "×"))
                continue
            chosen = trial.rate == run.learning_rate
            size = 7.0 if chosen else 3.5
            given_up = "" if trial.stopped_at is None else f", given up at step {trial.stopped_at}"
            tip = f"seed {run.seed}, rate {trial.rate:g}: {factor * trial.score:.4g}{given_up}"
            tip += ", chosen" if chosen else ""
            left, top = x(trial.rate) - size / 2, y(trial.score) - size / 2
            drawn.boxes.append(Box(left, top, size, size, 0.35 if given_up else 1.0, tip))
    return drawn


def _words(runs: Sequence[Record], factor: float) -> str:
    rates = sorted({trial.rate for run in runs for trial in run.learning_rates})
    scores = [trial.score for run in runs for trial in run.learning_rates if trial.score is not None]
    lost = sum(trial.score is None for run in runs for trial in run.learning_rates)
    chosen = join(
        [f"{rate:g}" for rate in sorted({run.learning_rate for run in runs if run.learning_rate is not None})]
    )
    reach = f"{factor * min(scores):.3g} to {factor * max(scores):.3g}" if scores else "no score"
    told = f"{plural(len(rates), 'rate')} from {rates[0]:g} to {rates[-1]:g}: {reach}"
    return told + (f"; {lost} diverged" if lost else "") + (f"; chosen {chosen}" if chosen else "")
