"""Records sorted into what may be compared, entries best first, each with a rank that chance does not explain."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from deltaworks.compare.entries import Entry, score_of
from deltaworks.compare.noise import SIGNIFICANCE, Array, Sample, compared
from deltaworks.store.records import Record

__all__ = ["Comparison", "Entry", "compare", "score_of"]


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
        """The methods that no other is clearly better than, best first."""
        return [
            entry for entry in self.candidates if not any(self.clearly_better(one, entry) for one in self.candidates)
        ]

    @cached_property
    def _chances(self) -> Array:
        """p-value that two scored entries differ, corrected for the number of pairs: [scored, scored]."""
        return compared(_alike([entry.sample for entry in self.scored]))

    def told_apart(self, first: Entry, second: Entry) -> bool:
        """Whether two scored entries differ by more than the noise that the records let us see (see ``noise``)."""
        return bool(self._chances[self._place[id(first)], self._place[id(second)]] < SIGNIFICANCE)

    def clearly_better(self, first: Entry, second: Entry) -> bool:
        """Whether ``first`` has the better score and can be told apart from ``second``."""
        assert first.score is not None
        assert second.score is not None
        return first.better(first.score, second.score) and self.told_apart(first, second)

    @cached_property
    def _place(self) -> dict[int, int]:
        return {id(entry): place for place, entry in enumerate(self.scored)}

    @cached_property
    def _ranks(self) -> dict[int, int]:
        return {id(entry): 1 + sum(self.clearly_better(other, entry) for other in self.scored) for entry in self.scored}

    def rank(self, entry: Entry) -> int | None:
        """1 + the number of entries, baselines among them, that are clearly better; None without a score."""
        return self._ranks.get(id(entry))

    @property
    def base_inference_speed(self) -> float | None:
        """Samples per second of the frozen model: of the head-only baseline, else of the fastest entry."""
        head = self.baseline("head")
        speeds = [entry.inference_samples_per_second for entry in ([head] if head else self.scored)]
        return max((speed for speed in speeds if speed), default=None)

    @property
    def cost_seconds(self) -> float | None:
        """Wall time of all runs, trials and tests among them."""
        known = [run.wall_seconds for run in self.records if run.wall_seconds is not None]
        return sum(known) if known else None

    @property
    def judged_examples(self) -> int | None:
        """How many test examples the differences are judged over; None where the records have none."""
        counts = [len(found.weights) for entry in self.scored if (found := entry.sample.examples) is not None]
        return counts[0] if counts else None

    def baseline(self, kind: str) -> Entry | None:
        """The scored baseline ``"full"`` or ``"head"``, the best where there are several."""
        return next((entry for entry in self.scored if entry.baseline == kind), None)

    @property
    def test_examples(self) -> int | None:
        """Size of the split that the scores come from, where the records say it."""
        return self.judged_examples or self.any_run.data.sizes.get(self.split)

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


def _alike(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of which only those keep their examples that have the same, as most have, with the same weights."""
    kinds = [(found.answers, found.weights.tobytes()) if (found := sample.examples) else None for sample in samples]
    kind = Counter(found for found in kinds if found is not None).most_common(1)
    return [
        sample if kind and found == kind[0][0] else replace(sample, examples=None)
        for sample, found in zip(samples, kinds, strict=True)
    ]


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
    """What makes runs repetitions of each other: all but the seed, and the learning rate and whose run chose it."""
    settings = {key: value for key, value in run.config.items() if key != "seed"}
    if isinstance(schedule := settings.get("schedule"), dict):
        settings["schedule"] = {key: value for key, value in schedule.items() if key != "searched_on"}
    config = sorted((key, str(value)) for key, value in settings.items())
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
