"""Records sorted into what may be compared: repetitions under one entry, entries best first."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from deltaworks.compare.noise import (
    SIGNIFICANCE,
    mcnemar,
    paired_p,
    student_quantile,
    welch_p,
    wilson_interval,
)
from deltaworks.store.records import Record

_FULL = {"full", "full-fine-tuning", "full_fine_tuning"}
_HEAD = {"head", "head-only", "head_only", "linear-probe", "linear_probe"}
_PROPORTIONS = {"accuracy", "f1", "macro_f1", "micro_f1", "exact_match", "precision", "recall", "auroc"}


@dataclass
class Entry:
    """All runs of one method with one configuration in one comparison."""

    label: str
    runs: list[Record]  # finished, with a score, one per seed, by seed
    unfinished: list[Record]  # and those that finished without a score
    split: str  # the split that ``scores`` come from: "test" or "validation"
    higher_is_better: bool

    @property
    def any_run(self) -> Record:
        """A run that stands for the others in what they share (configuration, counts)."""
        return (self.runs or self.unfinished)[0]

    @cached_property
    def scores(self) -> list[float]:
        """One score per seed."""
        return [score for run in self.runs if (score := score_of(run, self.split)) is not None]

    @cached_property
    def score(self) -> float | None:
        """The mean score over the seeds."""
        return statistics.fmean(self.scores) if self.scores else None

    @cached_property
    def answers(self) -> list[str]:
        """Per seed the 0/1 string of right test answers; empty unless every run has one of equal length."""
        if self.split != "test":
            return []
        strings = [run.test.correct for run in self.runs if run.test is not None and run.test.correct]
        whole = len(strings) == len(self.runs) and len({len(string) for string in strings}) == 1
        return strings if whole else []

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the score, None where the records cannot give one.

        It covers the noise of the seeds (Student) and that of the test examples (Wilson), whichever is
        wider; seeds that all score the same say nothing about noise.
        """
        ends: list[tuple[float, float]] = []
        if self.answers and self._answers_are_the_score:
            share = statistics.fmean(self.scores)
            ends.append(wilson_interval(share, len(self.answers[0])))
        if len(self.scores) >= 2 and (spread := statistics.stdev(self.scores)) > 0:
            mean = statistics.fmean(self.scores)
            half = student_quantile(len(self.scores) - 1) * spread / math.sqrt(len(self.scores))
            low, high = mean - half, mean + half
            ends.append((max(0.0, low), min(1.0, high)) if self.is_proportion else (low, high))
        return max(ends, key=lambda pair: pair[1] - pair[0]) if ends else None

    @property
    def is_proportion(self) -> bool:
        """Whether the score is a share of 1 that reads well in per cent."""
        test = self.any_run.test
        named = test is not None and test.metric.lower().replace(" ", "_").replace("-", "_") in _PROPORTIONS
        return (named or bool(self.answers)) and all(0 <= score <= 1 for score in self.scores)

    @property
    def _answers_are_the_score(self) -> bool:
        return all(
            abs(answers.count("1") / len(answers) - score) < 0.5 / len(answers)
            for answers, score in zip(self.answers, self.scores, strict=True)
        )

    @property
    def baseline(self) -> str | None:
        """``"full"`` (fine-tuning), ``"head"`` (only), or None for a method."""
        base = self.any_run.method.split("[", 1)[0].strip().lower()
        return "full" if base in _FULL else "head" if base in _HEAD else None

    def median(self, value: Callable[[Record], float | None]) -> float | None:
        """The median of ``value`` over the finished runs that have it."""
        values = [found for run in self.runs if (found := value(run)) is not None]
        return statistics.median(values) if values else None

    @property
    def peak_memory_bytes(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.peak_memory_bytes)

    @property
    def wall_seconds(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.wall_seconds)

    @property
    def training_samples_per_second(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.training_samples_per_second)

    @property
    def inference_samples_per_second(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.inference_samples_per_second)

    def better(self, first: float, second: float) -> bool:
        """Whether score ``first`` beats ``second``."""
        return first > second if self.higher_is_better else first < second


@dataclass
class Comparison:
    """The runs that may be compared: one model, one data set, one task, one metric."""

    records: list[Record]
    entries: list[Entry]  # best first; those without a score last
    split: str
    metric: str

    @property
    def any_run(self) -> Record:
        """A run that stands for the others in model, data and task."""
        return self.records[0]

    @cached_property
    def scored(self) -> list[Entry]:
        """Entries with a score, best first."""
        return [entry for entry in self.entries if entry.score is not None]

    @cached_property
    def candidates(self) -> list[Entry]:
        """Scored methods, best first; the baselines only where there is nothing else."""
        return [entry for entry in self.scored if entry.baseline is None] or self.scored

    @cached_property
    def leaders(self) -> list[Entry]:
        """The best method and those that cannot be told apart from it, best first."""
        if not self.candidates:
            return []
        best = self.candidates[0]
        return [best, *(entry for entry in self.candidates[1:] if not told_apart(best, entry))]

    def baseline(self, kind: str) -> Entry | None:
        """The scored baseline ``"full"`` or ``"head"``, the best where there are several."""
        return next((entry for entry in self.scored if entry.baseline == kind), None)

    @property
    def test_examples(self) -> int | None:
        """Size of the split that the scores come from, where the records say it."""
        for entry in self.scored:
            if entry.answers:
                return len(entry.answers[0])
        return self.any_run.data.sizes.get(self.split)

    def show(self, score: float, signed: bool = False) -> str:
        """A score for people: per cent where it is a proportion."""
        if all(entry.is_proportion for entry in self.scored):
            return f"{100 * score:+.1f}" if signed else f"{100 * score:.1f} %"
        return f"{score:+.3g}" if signed else f"{score:.4g}"

    def gap(self, difference: float) -> str:
        """The size of a difference of scores for people: in points where it is a proportion."""
        if all(entry.is_proportion for entry in self.scored):
            points = f"{abs(100 * difference):.1f}"
            return f"{points} point" if points == "1.0" else f"{points} points"
        return f"{abs(difference):.3g}"


def score_of(run: Record, split: str) -> float | None:
    """The score of ``run`` on ``split``: the test score, or the best validation score."""
    if split == "test":
        return run.test.score if run.test is not None else None
    return run.validation.best if run.validation.best is not None else run.validation.last


def told_apart(first: Entry, second: Entry) -> bool:
    """Whether two entries differ by more than the noise that the records let us see, at the 95 % level.

    With several seeds the differences per seed must be clear (paired t-test; Welch's where the seeds are not
    the same); with per-example answers the differences per test example must be clear as well (McNemar's
    exact test for one seed, a paired t-test of the means over seeds for several). Where the records hold
    neither, nothing can be told apart.
    """
    evidence = []
    mine = {run.seed: score for run, score in zip(first.runs, first.scores, strict=True)}
    theirs = {run.seed: score for run, score in zip(second.runs, second.scores, strict=True)}
    shared = sorted(mine.keys() & theirs.keys())
    differences = [mine[seed] - theirs[seed] for seed in shared]
    if len(shared) >= 2:
        # equal differences for all seeds say nothing about the noise between seeds
        if max(differences) - min(differences) > 1e-9:
            evidence.append(paired_p(differences))
    elif len(mine) >= 2 and len(theirs) >= 2 and len({*first.scores}) + len({*second.scores}) > 2:
        evidence.append(welch_p(first.scores, second.scores))
    if first.answers and second.answers and len(first.answers[0]) == len(second.answers[0]):
        evidence.append(_answers_p(first.answers, second.answers))
    return bool(evidence) and max(evidence) < SIGNIFICANCE


def _answers_p(first: Sequence[str], second: Sequence[str]) -> float:
    """The p-value that two entries differ over the same test examples."""
    if len(first) == len(second) == 1:
        pairs = Counter(zip(first[0], second[0], strict=True))
        return mcnemar(pairs["1", "0"], pairs["0", "1"])
    shares = [
        [column.count("1") / len(strings) for column in zip(*strings, strict=True)] for strings in (first, second)
    ]
    differences = [a - b for a, b in zip(*shares, strict=True)]
    return paired_p(differences) if len(differences) >= 2 else 1.0


def _latest_per_seed(runs: Iterable[Record]) -> list[Record]:
    by_seed: dict[int, Record] = {}
    for run in sorted(runs, key=lambda run: (run.finished is not None, str(run.finished), run.run_id)):
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def _named_spec(run: Record) -> str:
    """``LoRA [rank=16]``; the spec itself where methods are composed or no name is given."""
    _, bracket, settings = run.method.partition("[")
    if run.name == run.method or {"+", "["} & set(settings):
        return run.method
    return f"{run.name} [{settings}" if bracket else run.name


def _labels(runs: Sequence[Record]) -> list[str]:
    """The shortest labels that keep the entries apart: name, then settings, targets and schedule."""
    candidates = [
        [
            run.name,
            _named_spec(run),
            f"{_named_spec(run)} on {run.targets}",
            f"{_named_spec(run)} on {run.targets}, {run.steps} steps of {run.batch_size}",
        ]
        for run in runs
    ]
    labels = [options[0] for options in candidates]
    for level in range(1, 4):
        counts = Counter(labels)
        labels = [
            options[level] if counts[label] > 1 else label for label, options in zip(labels, candidates, strict=True)
        ]
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return numbered


def _variant(run: Record) -> tuple[str, ...]:
    """What makes runs repetitions of each other: all but seed and chosen learning rate."""
    config = sorted((key, str(value)) for key, value in run.config.items() if key != "seed")
    dtypes = sorted(run.dtypes.items())
    return run.method, run.targets, str(run.steps), str(run.batch_size), str(config), str(dtypes)


def compare(records: Sequence[Record]) -> list[Comparison]:
    """The records sorted into comparisons and entries; the comparison with the most runs first."""
    worlds: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        worlds[record.model.id, record.data.digest, record.data.task].append(record)
    comparisons = [_comparison(world) for world in worlds.values()]
    return sorted(comparisons, key=lambda found: -len(found.records))


def _comparison(records: list[Record]) -> Comparison:
    tests = [run.test for run in records if run.status == "finished" and run.test is not None]
    scored = [test for test in tests if test.score is not None]
    split = "test" if scored else "validation"
    metric, higher = (
        Counter((test.metric, test.higher_is_better) for test in scored or tests).most_common(1)[0][0]
        if tests
        else ("score", True)
    )
    variants: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for run in records:
        variants[_variant(run)].append(run)
    entries = []
    for label, group in zip(_labels([group[0] for group in variants.values()]), variants.values(), strict=True):
        usable = [
            run
            for run in group
            if run.status == "finished"
            and score_of(run, split) is not None
            and (split != "test" or (run.test is not None and run.test.metric == metric))
        ]
        kept = _latest_per_seed(usable)
        done = {run.seed for run in kept}
        unfinished = [run for run in group if run not in usable and run.seed not in done]
        if kept or unfinished:
            entries.append(Entry(label, kept, unfinished, split, higher))
    sign = -1 if higher else 1
    entries.sort(key=lambda entry: (entry.score is None, sign * (entry.score or 0.0), entry.any_run.counts.trainable))
    return Comparison(records, entries, split, metric)
