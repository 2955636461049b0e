"""What the user's own records say about methods, and whether advice stands up to records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.compare.standings import Comparison, Entry, compare
from deltaworks.core.errors import UserError
from deltaworks.store.records import Record, read_records

SAME = 0.02  # models whose sizes differ by less are taken for the same: heads make small differences


@dataclass(frozen=True)
class Finding:
    """What one comparison found of one method. Memory in bytes; medians over the seeds."""

    spec: str
    record: str  # leader: in the best group; behind: told apart from it; failed: no run finished
    base: str  # same: the same model; class: one of its size class (a factor of ten)
    told: str
    rate: float | None
    batch: int
    peak_bytes: float | None
    samples_per_second: float | None

    def facts(self) -> dict[str, Any]:
        return {"record": self.record, "record_base": self.base, "record_told": self.told}


NOTHING: Mapping[str, Any] = {"record": None, "record_base": None, "record_told": ""}


def read_own(folder: Path) -> list[Record]:
    """The records in a folder, or in the folder "records" of a comparison. Raises UserError where there are none."""
    inside = folder / "records"
    records = read_records(inside if inside.is_dir() else folder)
    if not records:
        raise UserError(f"--records {str(folder)!r} holds no records: give the folder of a comparison")
    return records


def findings(
    records: Sequence[Record], parameters: int, task: str | None, storage: float | None = None
) -> dict[str, Finding]:
    """By method name, the finding of the comparison nearest to a model of so many parameters and a task.

    Comparisons of other tasks and other size classes are left out, and so is what stores more than ``storage`` bytes:
    who leads is asked among those that may be had. The same model goes before the size class, then the comparison with
    more runs. Of several configurations of a method the best counts.
    """
    found: dict[str, Finding] = {}
    comparisons = [each for each in compare(records) if task is None or each.any_run.data.task == task]
    for base in ("same", "class"):
        for comparison in comparisons:
            if base_of(comparison.any_run.model.parameters, parameters) != base:
                continue
            within = keeping(comparison, storage=storage)
            best = [] if within is None else best_group(within)
            for entry in [] if within is None else within.entries:  # best first
                found.setdefault(method_of(entry), _finding(comparison, entry, entry in best, base))
    return found


def base_of(measured: int, parameters: int) -> str | None:
    """How near a measured model is in size: "same", "class" or None."""
    if abs(measured - parameters) <= SAME * parameters:
        return "same"
    return "class" if int(math.log10(max(measured, 1))) == int(math.log10(max(parameters, 1))) else None


def keeping(
    comparison: Comparison, *, memory: float | None = None, storage: float | None = None, among: Set[str] | None = None
) -> Comparison | None:
    """The comparison of the entries that keep a constraint, as ``stands_up`` has them; None where there are none."""
    if memory is storage is among is None:
        return comparison
    kept = [
        entry
        for entry in comparison.scored
        if (among is None or method_of(entry) in among)
        and (memory is None or (entry.peak_memory_bytes or math.inf) <= memory)
        and (storage is None or entry.any_run.counts.stored_bytes <= storage)
    ]
    return compare([run for entry in kept for run in entry.runs])[0] if kept else None


def best_group(comparison: Comparison) -> list[Entry]:
    """The entries that no other is clearly better than, baselines among them."""
    return [entry for entry in comparison.scored if comparison.rank(entry) == 1]


def method_of(entry: Entry) -> str:
    """The name of a method, or the whole spec of a composition."""
    spec = entry.any_run.method
    return spec if "+" in spec.partition("[")[0] or "]+" in spec else spec.partition("[")[0]


def _finding(comparison: Comparison, entry: Entry, leads: bool, base: str) -> Finding:
    rates = [run.learning_rate for run in entry.runs if run.learning_rate is not None]
    run = comparison.any_run
    where = f"{run.data.name} with {run.model.id}"
    if entry.score is None:
        record, told = "failed", f"{where}: {entry.any_run.message or entry.any_run.status}"
    else:
        record = "leader" if leads else "behind"
        told = f"{comparison.metric} {comparison.show(entry.score)} on {where}"
    return Finding(
        spec=entry.any_run.method,
        record=record,
        base=base,
        told=told,
        rate=statistics.median_low(rates) if rates else None,
        batch=run.batch_size,
        peak_bytes=entry.peak_memory_bytes,
        samples_per_second=entry.training_samples_per_second,
    )


@dataclass(frozen=True)
class Verdict:
    """How an advised method did in one comparison, among the entries that keep the constraint."""

    comparison: str
    method: str
    score: float | None  # None: it was not run, or breaks the constraint
    best: str
    best_score: float
    in_best_group: bool
    group: int  # methods in the best group, of
    entries: int  # so many: where they are equal, the records tell nothing apart
    on_front: bool  # no other entry scores as much at a lower cost, or more at the same

    @property
    def stands(self) -> bool:
        return self.in_best_group or self.on_front


def stands_up(
    records: Sequence[Record],
    method: str,
    *,
    cost: str = "trainable",
    memory: float | None = None,
    storage: float | None = None,
    among: Iterable[str] | None = None,
) -> list[Verdict]:
    """Whether an advised method lies in the best rank group or on the Pareto front, in each comparison of the records.

    Args:
        records: Runs, of one or several comparisons.
        method: The method's name.
        cost: What the front weighs against the score: "trainable", "stored" (bytes) or "memory" (peak bytes).
        memory: Most peak memory, in bytes; entries that took more do not count.
        storage: Most stored bytes.
        among: The only methods that count, such as those that merge; default: all.

    A comparison in which nothing keeps the constraint gives no verdict.
    """
    verdicts = []
    allowed = None if among is None else set(among)
    for comparison in compare(records):
        within = keeping(comparison, memory=memory, storage=storage, among=allowed)
        if within is None:
            continue
        own = next((entry for entry in within.scored if method_of(entry) == method), None)
        best, group = within.scored[0], best_group(within)
        run = comparison.any_run
        verdicts.append(
            Verdict(
                comparison=f"{run.data.name} with {run.model.id}",
                method=method,
                score=None if own is None else own.score,
                best=best.any_run.method,
                best_score=best.score or 0.0,
                in_best_group=own is not None and own in group,
                group=len(group),
                entries=len(within.scored),
                on_front=own is not None and not any(_dominates(other, own, cost) for other in within.scored),
            )
        )
    return verdicts


def _dominates(other: Entry, own: Entry, cost: str) -> bool:
    if other.score is None or own.score is None:
        return False
    theirs, mine = _cost(other, cost), _cost(own, cost)
    no_worse = not own.better(own.score, other.score) and theirs <= mine
    return no_worse and (own.better(other.score, own.score) or theirs < mine)


def _cost(entry: Entry, cost: str) -> float:
    costs = {
        "trainable": entry.any_run.counts.trainable,
        "stored": entry.any_run.counts.stored_bytes,
        "memory": math.inf if entry.peak_memory_bytes is None else entry.peak_memory_bytes,
    }
    return float(costs[cost])
