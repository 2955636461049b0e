"""All runs of one method in one comparison as one entry: its score with the noise that is known of it, its costs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltaworks.compare.noise import Examples, Sample, interval
from deltaworks.store.records import Record

_FULL = {"full", "full-fine-tuning", "full_fine_tuning"}
_HEAD = {"head", "head-only", "head_only", "linear-probe", "linear_probe"}
_PROPORTIONS = {
    "accuracy",
    "token_accuracy",
    "f1",
    "macro_f1",
    "micro_f1",
    "exact_match",
    "last_number",
    "rouge_l",
    "precision",
    "recall",
    "auroc",
}


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

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @cached_property
    def sample(self) -> Sample:
        """What is known of the noise: the scores by seed and, where each record has them, those of the examples."""
        scores = {run.seed: score for run, score in zip(self.runs, self.scores, strict=True)}
        tests = [run.test for run in self.runs if run.test is not None] if self.split == "test" else []
        right = [test.correct or "" for test in tests]
        rows = [[float(mark) for mark in marks] for marks in right] if all(right) else [test.values for test in tests]
        weights = next((test.weights for test in tests if test.weights and not all(right)), None)
        alike = all(test.weights in ([], weights or []) for test in tests) or all(right)
        if len(rows) != len(scores) or not alike or len({len(row) for row in rows}) != 1 or not rows[0]:
            return Sample(scores)
        values = np.array(rows)
        shares = np.array(weights or [1.0] * len(rows[0]))
        if shares.sum() <= 0:
            return Sample(scores)
        shares /= shares.sum()
        # a score that is not the mean over the examples, such as F1, has another noise than they
        if np.abs(values @ shares - self.scores).max() > 0.5 / len(shares):
            return Sample(scores)
        return Sample(scores, Examples(values, shares, answers=all(right)))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the score over seeds and test examples, None where the records cannot give one."""
        found = interval(self.sample) if self.scores else None
        if found is not None and self.is_proportion:
            return max(0.0, found[0]), min(1.0, found[1])
        return found

    @property
    def is_proportion(self) -> bool:
        """Whether the score is a share of 1 that reads well in per cent."""
        test = self.any_run.test
        named = test is not None and test.metric.lower().replace(" ", "_").replace("-", "_") in _PROPORTIONS
        return (named or bool(self.sample.examples and self.sample.examples.answers)) and all(
            0 <= score <= 1 for score in self.scores
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
    def cost_seconds(self) -> float | None:
        """Wall time of all its runs, trials and tests among them."""
        known = [run.wall_seconds for run in (*self.runs, *self.unfinished) if run.wall_seconds is not None]
        return sum(known) if known else None

    @property
    def training_seconds(self) -> float | None:
        """Of one training at the measured speed, median over the seeds; loading, trials and tests are not counted."""
        return self.median(
            lambda run: run.examples / run.training_samples_per_second if run.training_samples_per_second else None
        )

    @property
    def training_samples_per_second(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.training_samples_per_second)

    @property
    def inference_samples_per_second(self) -> float | None:
        """Median over the seeds."""
        return self.median(lambda run: run.inference_samples_per_second)

    @property
    def rank_of_change(self) -> float | None:
        """The median over the seeds."""
        return self.median(rank_of)

    def better(self, first: float, second: float) -> bool:
        """Whether score ``first`` beats ``second``."""
        return first > second if self.higher_is_better else first < second


def score_of(run: Record, split: str) -> float | None:
    """The score of ``run`` on ``split``: the test score, or the best validation score."""
    if split == "test":
        return run.test.score if run.test is not None else None
    return run.validation.best if run.validation.best is not None else run.validation.last


def rank_of(run: Record) -> float | None:
    """The median over roles of the numerical rank of the weight changes, without the fresh head's."""
    ranks = [role.median for name, role in run.rank.items() if name != "head"]
    return statistics.median(ranks) if ranks else None
