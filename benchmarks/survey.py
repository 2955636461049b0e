"""The survey's fifteen methods head to head, as tables, and what `deltaworks advise` says beside them.

    deltaworks compare --protocol survey-small --data-root DATA --out benchmarks/results/survey-small
    python benchmarks/survey.py            # results/survey-small.md, from the records alone

Of the folder of the comparison the records and the page are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from deltaworks.advise.advice import Adviser
from deltaworks.advise.candidates import candidates
from deltaworks.advise.estimate import estimate
from deltaworks.advise.evidence import Verdict, read_own, stands_up
from deltaworks.advise.wishes import parse_wishes
from deltaworks.compare.standings import Comparison, Entry, compare
from deltaworks.compare.wording import join, plural, scientific, show_bytes, show_count, show_seconds
from deltaworks.store.records import Record

RESULTS = Path(__file__).parent / "results" / "survey-small"
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"storage": "1MB"},
    {"storage": "300kB"},
    {"memory": "350MB"},
    {"merge": True},
    {"adapters_served": 200},
    {"trials": 1},
)
"""Constraints that advice is asked for under, each for every model and data set."""
MODELS = {"classification": "minilm", "causal": "tiny-lm"}  # of the protocol, by task


def label(entry: Entry) -> str:
    """A method as the table calls it: LoRA is there twice."""
    name = entry.any_run.method.partition("[")[0]
    if name != "lora":
        return name
    return "lora on q, v" if "attention" in entry.any_run.targets else "lora, all linear"


def world(comparison: Comparison) -> str:
    run = comparison.any_run
    return f"{run.data.name}, {MODELS[run.data.task]}"


def with_interval(comparison: Comparison, entry: Entry) -> str:
    """The score and half of its 95 % interval, in per cent."""
    assert entry.score is not None
    half = "" if entry.interval is None else f" ± {50 * (entry.interval[1] - entry.interval[0]):.1f}"
    return f"{100 * entry.score:.1f}{half}"


def summary(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """One row for each method: its score and rank in every world, and what it takes."""
    yield "| method | " + " | ".join(map(world, comparisons)) + " | trained | stored |"
    yield "|---" * (len(comparisons) + 3) + "|"
    by_name = [{label(entry): entry for entry in comparison.scored} for comparison in comparisons]

    def place(name: str) -> tuple[float, float]:
        own = [
            (comparison, found[name]) for comparison, found in zip(comparisons, by_name, strict=True) if name in found
        ]
        ranks = [comparison.rank(entry) or 0 for comparison, entry in own]
        return sum(ranks) / len(ranks), -sum(entry.score or 0.0 for _, entry in own) / len(own)

    for name in sorted(set().union(*by_name), key=place):
        cells = []
        for comparison, found in zip(comparisons, by_name, strict=True):
            entry = found.get(name)
            cells.append(f"{with_interval(comparison, entry)} ({comparison.rank(entry)})" if entry else "-")
        counts = next(found[name] for found in by_name if name in found).any_run.counts
        yield f"| {name} | {' | '.join(cells)} | {show_count(counts.trainable)} | {show_bytes(counts.stored_bytes)} |"


def at_the_edge(comparison: Comparison) -> int:
    """How many methods took the highest learning rate of their search."""
    searched = [(entry, run) for entry in comparison.scored for run in entry.runs if run.learning_rates]
    found = {id(e) for e, run in searched if run.learning_rate == max(trial.rate for trial in run.learning_rates)}
    return len(found)


def details(comparison: Comparison) -> Iterator[str]:
    """Everything else that was measured of one world."""
    yield f"## {world(comparison)}"
    yield ""
    run = comparison.any_run
    yield (
        f"{run.steps} steps of {run.batch_size}; {plural(comparison.test_examples or 0, 'test row')}; "
        f"{comparison.metric} in per cent, with half of the 95 % interval; "
        f"{show_seconds(comparison.cost_seconds or 0)} of runs. "
        f"{at_the_edge(comparison)} of {plural(len(comparison.scored), 'method')} chose the highest rate that they "
        "tried: the more do, the more the order is that of one short search."
    )
    yield ""
    yield "| rank | method | score | sd | rate | peak memory | training, samples/s | rank of change | forgetting |"
    yield "|---" * 9 + "|"
    for entry in comparison.scored:
        deviation = "" if entry.deviation is None else f"{100 * entry.deviation:.1f}"
        rate = entry.any_run.learning_rate
        forgetting = entry.median(lambda run: run.forgetting)
        cells = [
            comparison.rank(entry),
            label(entry),
            with_interval(comparison, entry),
            deviation,
            "" if rate is None else scientific(rate),
            show_bytes(entry.peak_memory_bytes or 0),
            f"{entry.training_samples_per_second or 0:.0f}",
            "" if entry.rank_of_change is None else f"{entry.rank_of_change:g}",
            "" if forgetting is None else f"{forgetting:+.2f}",
        ]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


@dataclass(frozen=True)
class Answer:
    """What was advised under some constraint, and how that did."""

    model: str
    wishes: dict[str, Any]
    method: str
    verdicts: list[Verdict]


def answers(records: Sequence[Record]) -> list[Answer]:
    """Advice from the rules alone, among the methods that were run, held against each world of the same model."""
    found = []
    for comparison in compare(records):
        own, run = comparison.records, comparison.any_run
        task, model = run.data.task, MODELS[run.data.task]
        names = list(dict.fromkeys(record.method.partition("[")[0] for record in own))
        for wishes in WISHES:
            given = {
                "model": model, "task": task, "labels": max(2, len(run.data.labels)),
                "examples": run.data.sizes["train"], "batch": run.batch_size,
                "length": run.config["schedule"]["max_length"], "methods": ",".join(names), "hardware": "rtx-4090",
                **wishes,
            }  # fmt: skip
            asked = parse_wishes(given)
            best = Adviser(estimate).judge(asked, 1).options[0]
            fitting = [each.name for each in candidates() if each.facts["merges"] or not asked.merge]
            verdicts = stands_up(own, best.method, memory=asked.memory, storage=asked.storage, among=fitting)
            found.append(Answer(model, wishes, best.spec, verdicts))
    return found


def advice(records: Sequence[Record]) -> Iterator[str]:
    yield "## What `deltaworks advise` says, held against these runs"
    yield ""
    yield (
        "From the rules alone, without these records, among the methods that were run. It stands where the method is "
        "in the best rank group or on the Pareto front of score and trained values, among those that keep the "
        "constraint. An answer is 'not run' where no run of the method keeps the constraint: a smaller rank or a "
        "smaller batch would."
    )
    yield ""
    yield "| world | constraint | advised | stands | score | best |"
    yield "|---" * 6 + "|"
    for answer in answers(records):
        constraint = ", ".join(f"{key} {value}" for key, value in answer.wishes.items()) or "none"
        for verdict in answer.verdicts:
            how = [word for word, true in (("best group", verdict.in_best_group), ("front", verdict.on_front)) if true]
            stands = "not run" if verdict.score is None else join(how) or "**no**"
            score = "-" if verdict.score is None else f"{100 * verdict.score:.1f}"
            yield "| " + " | ".join([
                f"{verdict.comparison.partition(' with ')[0]}, {answer.model}", constraint, answer.method,
                stands, score, f"{100 * verdict.best_score:.1f} ({verdict.best.partition('[')[0]})",
            ]) + " |"  # fmt: skip


def page(records: Sequence[Record]) -> Iterator[str]:
    comparisons = compare(records)
    seconds = sum(comparison.cost_seconds or 0 for comparison in comparisons)
    work = sum(record.processor_seconds or 0 for record in records)
    yield "# The survey's fifteen methods, head to head"
    yield ""
    yield (
        f"{plural(len(records), 'run')} on {records[0].hardware}: {show_seconds(seconds)} of runs, "
        f"{show_seconds(work)} of one core. Made by `deltaworks compare --protocol survey-small`; this page by "
        f"[benchmarks/survey.py](../survey.py), [survey-small/report.html](survey-small/report.html) by "
        f"`deltaworks report`. In brackets the rank: 1 + the number of methods that are clearly better. Trained and "
        "stored are of the first model. Memory and times are those of the days of the runs, a third of which came "
        "before the lean layers."
    )
    yield ""
    yield from summary(comparisons)
    yield ""
    for comparison in comparisons:
        yield from details(comparison)
    yield from advice(records)


def main(folder: Path = RESULTS) -> None:
    """Write the tables of a folder of records beside it."""
    folder.with_suffix(".md").write_text("\n".join(page(read_own(folder))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
