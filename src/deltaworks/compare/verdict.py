"""What a set of runs shows, in plain sentences that claim no more than the runs can carry."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from deltaworks.compare.standings import Comparison, Entry, compare
from deltaworks.compare.wording import join, plural, show_bytes, show_count, show_share, three_digits
from deltaworks.store.records import Record

# Speeds and memories of repeated runs differ by a few per cent; a smaller lead is not worth a sentence.
_SPREAD = 0.05


def verdict(records: Sequence[Record]) -> list[str]:
    """A few plain sentences for a person: who leads, at what cost, against which baselines, how surely.

    Methods are "told apart" only where a test at the 95 % level, paired over seeds and test examples and corrected
    for the number of comparisons, says so (see ``noise``).
    Records of several models or data sets are judged apart, each under its name.
    """
    comparisons = compare(records)
    if len(comparisons) == 1:
        return describe(comparisons[0])
    return [
        f"{found.any_run.data.name} with {found.any_run.model.id}: {sentence}"
        for found in comparisons
        for sentence in describe(found)
    ]


def describe(comparison: Comparison) -> list[str]:
    """The sentences of ``verdict`` for one comparison: its findings, then its caveats."""
    return [*findings(comparison), *caveats(comparison)]


def findings(comparison: Comparison) -> list[str]:
    """What one comparison shows; the first sentence says who leads."""
    if not comparison.scored:
        return ["No run finished with a score, so nothing can be ranked.", *_unfinished(comparison)]
    return [_lead(comparison), *_cheapest(comparison), *_baselines(comparison), *_unfinished(comparison)]


def _lead(comparison: Comparison) -> str:
    leaders, others = comparison.leaders, len(comparison.candidates) - len(comparison.leaders)
    best = leaders[0]
    assert best.score is not None
    score = f"{comparison.show(best.score)} {comparison.split} {comparison.metric}"
    if len(comparison.candidates) == 1:
        return f"{best.label} reaches {score}; there is no other method to compare it with."
    if len(leaders) == 1:
        runner_up = comparison.candidates[1]
        assert runner_up.score is not None
        gap = comparison.gap(best.score - runner_up.score)
        return f"{best.label} leads with {score}, {gap} ahead of {runner_up.label}."
    rest = [entry.label for entry in leaders[1:]]
    opening = f"Of the methods {best.label} has the {'highest' if best.higher_is_better else 'lowest'}"
    opening += f" mean, {score}, but " if max(map(_seeds, leaders)) > 1 else f" score, {score}, but "
    if others == 0:
        return f"{opening}none of the {len(leaders)} methods can be told apart from it."
    return f"{opening}{join(rest)} cannot be told apart from it; {plural(others, 'method')} clearly trail" + (
        "s." if others == 1 else "."
    )


def _seeds(entry: Entry) -> int:
    return len(entry.runs)


def _cheapest(comparison: Comparison) -> list[str]:
    """Who within the leading group is smallest, fastest and leanest; silent where there is no real spread."""
    group = comparison.leaders
    if len(comparison.candidates) == 1:
        return []
    if len(group) == 1:
        memory = group[0].peak_memory_bytes
        return [f"It trains {_size(group[0])}" + (f" and peaks at {show_bytes(memory)} of memory." if memory else ".")]
    praise: dict[str, list[str]] = defaultdict(list)
    sizes = [(float(entry.any_run.counts.trainable), entry) for entry in group]
    if smallest := _stands_out(sizes, lowest=True, spread=0.0):
        praise[smallest[1].label].append(f"is the smallest ({_size(smallest[1])})")
    speeds = [(entry.training_samples_per_second, entry) for entry in group]
    if fastest := _stands_out(speeds, lowest=False, spread=_SPREAD):
        praise[fastest[1].label].append(f"trains fastest ({three_digits(fastest[0])} samples per second)")
    memories = [(entry.peak_memory_bytes, entry) for entry in group]
    if leanest := _stands_out(memories, lowest=True, spread=_SPREAD):
        praise[leanest[1].label].append(f"needs the least memory ({show_bytes(leanest[0])} at its peak)")
    clauses = [f"{label} {join(reasons)}" for label, reasons in praise.items()]
    return [f"Within this group {'; '.join(clauses)}."] if clauses else []


def _size(entry: Entry) -> str:
    run = entry.any_run
    share = show_share(run.counts.trainable, run.model.parameters)
    return f"{show_count(run.counts.trainable)} trainable parameters" + (f", {share} of the model" if share else "")


def _stands_out(
    values: Sequence[tuple[float | None, Entry]], *, lowest: bool, spread: float
) -> tuple[float, Entry] | None:
    """The lowest or highest value with its entry, where the values differ by more than the share ``spread``."""
    known = [(value, entry) for value, entry in values if value is not None]
    if not known:
        return None
    low, high = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
    return (low if lowest else high) if high[0] - low[0] > spread * high[0] else None


def _baselines(comparison: Comparison) -> list[str]:
    best = comparison.candidates[0]
    if best.baseline is not None or best.score is None:
        return []
    sentences = []
    full, head = comparison.baseline("full"), comparison.baseline("head")
    if full is not None and full.score is not None:
        reached = f"Full fine-tuning reaches {comparison.show(full.score)}"
        gap = comparison.gap(best.score - full.score)
        if not comparison.told_apart(best, full):
            sentences.append(f"{reached} and cannot be told apart from {best.label}.")
        elif best.better(best.score, full.score):
            sentences.append(f"{reached}: {best.label} is {gap} better.")
        else:
            sentences.append(f"{reached}: {best.label} stays {gap} behind it.")
    if head is not None and head.score is not None:
        reached = f"Training only the head reaches {comparison.show(head.score)}"
        gap = comparison.gap(best.score - head.score)
        if not comparison.told_apart(best, head):
            sentences.append(f"{reached}, and {best.label} shows no clear gain over it.")
        elif best.better(best.score, head.score):
            sentences.append(f"{reached}, so {best.label} gains {gap} over a frozen model.")
        else:
            sentences.append(f"{reached}, {gap} better than the best method: something hinders the methods here.")
    return sentences


def _unfinished(comparison: Comparison) -> list[str]:
    lost = [(run.status, entry.label) for entry in comparison.entries for run in entry.unfinished]
    if not lost:
        return []
    parts = []
    words = {"diverged": "diverged", "failed": "failed", "interrupted": "was interrupted"}
    for status, word in words.items():
        labels = Counter(label for found, label in lost if found == status)
        if labels:
            verb = word if len(labels) == 1 or word != "was interrupted" else "were interrupted"
            shown = [label if count == 1 else f"{label} ({count} runs)" for label, count in labels.items()]
            parts.append(f"{join(shown)} {verb}")
    many = len(comparison.records)
    return [f"{plural(len(lost), 'run')} of {many} did not finish: {'; '.join(parts)}."]


def caveats(comparison: Comparison) -> list[str]:
    """What limits the findings of one comparison: seeds, test examples, the search, unequal runs."""
    entries = comparison.scored
    if not entries:
        return []
    sentences = []
    seeds = sorted({_seeds(entry) for entry in entries})
    size = comparison.test_examples
    on = f" on {plural(size, f'{comparison.split} example')}" if size else f" on the {comparison.split} split"
    if seeds == [1]:
        noise = "another seed may change the order" if len(entries) > 1 else "another seed may change it"
        basis = f"Each score is one seed{on}; {noise}"
        judged = comparison.judged_examples is not None
        if len(entries) == 1 or judged:
            sentences.append(f"{basis}.")
        else:
            sentences.append(f"{basis}, and without per-example results no difference can be called clear.")
    else:
        counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        sentences.append(f"Scores are means over {counts} seeds{on}, with 95 % intervals.")
    if comparison.split == "validation":
        sentences.append("No run has a test score: these validation scores helped to choose the runs and flatter them.")
    sentences += _search_caveats(entries) + _unequal(entries)
    return sentences


def _search_caveats(entries: Sequence[Entry]) -> list[str]:
    # a rate that another seed's search chose is not a search
    searches = [[run for run in entry.runs if run.searched_on is None] or entry.runs for entry in entries]
    trials = sorted({len(run.learning_rates) for runs in searches for run in runs})
    if trials == [0]:
        return []
    if len(trials) > 1:
        return [
            f"The number of learning rates tried differs between runs ({trials[0]} to {trials[-1]}), "
            "which favours those with more."
        ]
    if trials == [1]:
        return ["Only one learning rate was tried, so a method may trail because the rate did not suit it."]
    edge = []
    for entry, runs in zip(entries, searches, strict=True):
        rates = [sorted(trial.rate for trial in run.learning_rates) for run in runs]
        chosen = [run.learning_rate for run in runs]
        if all(rate in (tried[0], tried[-1]) for rate, tried in zip(chosen, rates, strict=True)):
            edge.append(entry.label)
    sentence = f"{trials[0]} learning rates were tried per method"
    if not edge:
        return [f"{sentence}."]
    take = "takes" if len(edge) == 1 else "take"
    return [f"{sentence}; {join(edge, 4)} {take} the smallest or largest and may gain from a wider search."]


def _unequal(entries: Sequence[Entry]) -> list[str]:
    runs = [run for entry in entries for run in entry.runs]
    facts: list[tuple[str, set[object]]] = [
        ("steps", {run.steps for run in runs}),
        ("batch size", {run.batch_size for run in runs}),
        (
            "trained head",
            {run.counts.head for entry in entries if entry.baseline is None for run in entry.runs},
        ),
        ("hardware", {run.hardware for run in runs}),
    ]
    unequal = [name for name, values in facts if len(values) > 1]
    if not unequal:
        return []
    return [f"The runs are not alike in {join(unequal)}, so the comparison is not quite fair."]
