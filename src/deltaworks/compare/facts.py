"""The fine print: every fact of every run, and what all runs of a comparison share.

Facts are pairs of a name and a text; one without a text is left out.
"""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaworks.compare.standings import Comparison, Entry, score_of
from deltaworks.compare.wording import plural, show_bytes, show_seconds
from deltaworks.store.records import Record


@dataclass
class Setting:
    """All facts of one run, for the section of details."""

    title: str
    summary: str
    message: str
    facts: list[tuple[str, str]]


def setting(entry: Entry, run: Record) -> Setting:
    """The facts of ``run``, one of those of ``entry``."""
    score = score_of(run, entry.split)
    summary = run.status if score is None or run.status != "finished" else f"{entry.split} score {score:.4g}"
    counts = run.counts
    facts = [
        ("Run", run.run_id),
        ("Method", run.method),
        ("Family", run.family),
        ("Paper", run.paper),
        ("Targets", f"{run.targets} ({plural(run.sites, 'site')})" if run.targets or run.sites else ""),
        (
            "Counts",
            f"{counts.trainable:,} trainable, {counts.changed:,} changed, {counts.head:,} in the head, "
            f"{counts.stored_bytes:,} bytes stored",
        ),
        (
            "Rank of the change",
            "; ".join(f"{role}: median {rank.median:g}, max {rank.max:g}" for role, rank in sorted(run.rank.items())),
        ),
        ("Types", _pairs(run.dtypes)),
        ("Optimizer", run.optimizer),
        ("Learning rates", _learning_rates(run)),
        ("Chosen rate", _chosen_rate(run)),
        ("Schedule", _schedule(run)),
        ("Validation", _known((("last", run.validation.last), ("best", run.validation.best)), "{0} {1:.4g}")),
        ("Peak memory", _peak_memory(run)),
        ("Saved activations", "" if run.saved_activation_bytes is None else show_bytes(run.saved_activation_bytes)),
        (
            "Samples per second",
            _known(
                (("training", run.training_samples_per_second), ("inference", run.inference_samples_per_second)),
                "{1:,.4g} in {0}",
            ),
        ),
        (
            "Tokens per second",
            _known(
                (("training", run.training_tokens_per_second), ("inference", run.inference_tokens_per_second)),
                "{1:,.0f} in {0}",
            ),
        ),
        (
            "Time",
            _known((("of the clock", run.wall_seconds), ("of all cores", run.processor_seconds)), "{1:,.4g} s {0}"),
        ),
        ("Forgetting", _forgetting(run)),
        ("Merge error", "" if run.merge_error is None else f"{run.merge_error:.2g} (largest output difference)"),
        ("Started", _moment(run.started)),
        ("Finished", _moment(run.finished)),
        ("Configuration", _json(run.config)),
        ("Process peak", "" if run.process_peak_bytes is None else show_bytes(run.process_peak_bytes)),
        ("Details", "\n".join(f"{key}: {json.dumps(told, ensure_ascii=False)}" for key, told in run.details.items())),
    ]
    return Setting(
        title=f"Seed {run.seed}",
        summary=summary,
        message=run.message,
        facts=_told(facts),
    )


def shared_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What all runs share; where they differ, all values."""
    run, runs = comparison.any_run, comparison.records
    facts = [
        ("Model", f"{run.model.id}, {run.model.parameters:,} parameters"),
        ("Data", f"{run.data.name}, digest {run.data.digest}"),
        ("Task", run.data.task),
        ("Examples", ", ".join(f"{size:,} {split}" for split, size in run.data.sizes.items())),
        ("Labels", _labels(run.data.labels)),
        ("Head", f"{run.counts.head:,} values, trained with every method" if run.counts.head else ""),
        ("Differences", judging(comparison)),
        ("Cost", _cost(comparison)),
        ("Optimizer", _each(found.optimizer for found in runs)),
        ("Learning rate chosen on", _each(found.learning_rate_split for found in runs)),
        ("Memory includes", _each(found.peak_memory_includes for found in runs)),
        ("Hardware", _each(found.hardware for found in runs)),
        ("Versions", _each(_pairs(found.versions) for found in runs)),
    ]
    return _told(facts)


def judging(comparison: Comparison) -> str:
    """How it is judged whether a difference is clear, as far as it concerns this comparison."""
    entries = comparison.scored
    seeds = max((len(entry.runs) for entry in entries), default=0)
    examples = comparison.judged_examples
    if len(entries) < 2:
        return ""
    over = [plural(examples, "test example")] if examples else []
    over += [plural(seeds, "seed")] if seeds > 1 else []
    if not over:
        return "Neither test examples nor several seeds are in the records, so no difference can be called clear."
    found = entries[0].sample.examples
    if seeds > 1:
        test = (
            "The squared difference of two means over its variance between seeds plus that between test examples "
            "(Clark's quasi-F, with the degrees of freedom of Welch and Satterthwaite); "
            if examples
            else "The difference of two means over its deviation between seeds (Student's t); "
        )
        test += "a method whose seeds differ less than is typical is given the typical variance"
    else:
        test = "McNemar's exact test" if found is not None and found.answers else "Student's paired t-test"
    pairs = len(entries) * (len(entries) - 1) // 2
    return (
        f"Paired over {' and '.join(over)}. {test}. Clear means p < 0.05 after Holm's correction for "
        f"{plural(pairs, 'comparison')}. Rank: 1 + the number of entries that are clearly better. Intervals: 95 %, "
        f"over {' and '.join(over)}."
    )


def _cost(comparison: Comparison) -> str:
    if comparison.cost_seconds is None:
        return ""
    runs = comparison.records
    trained = plural(sum(len(run.learning_rates) for run in runs), "training")
    cores = [run.processor_seconds for run in runs if run.processor_seconds is not None]
    share = f" ({show_seconds(sum(cores))} of processor time)" if len(cores) == len(runs) else ""
    clock = show_seconds(comparison.cost_seconds)
    return f"{clock}{share}: {plural(len(runs), 'run')}, {trained}, loading and tests included"


def _told(facts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, text) for name, text in facts if text]


def _each(values: Iterable[str]) -> str:
    """The values that are not empty, each once."""
    return "; ".join(dict.fromkeys(value for value in values if value))


def _known(values: Iterable[tuple[str, float | None]], form: str) -> str:
    """The values that were measured; ``form`` shows a name (0) and its value (1)."""
    return ", ".join(form.format(name, value) for name, value in values if value is not None)


def _learning_rates(run: Record) -> str:
    return ", ".join(
        f"{trial.rate:g} → {'diverged' if trial.score is None else f'{trial.score:.4g}'}"
        + ("" if trial.stopped_at is None else f" (given up at step {trial.stopped_at:,})")
        for trial in run.learning_rates
    )


def _chosen_rate(run: Record) -> str:
    if run.learning_rate is None:
        return ""
    split = f", on the {run.learning_rate_split} split" if run.learning_rate_split else ""
    other = "" if run.searched_on is None else f", by the search of seed {run.searched_on}"
    return f"{run.learning_rate:g}{split}{other}"


def _schedule(run: Record) -> str:
    epochs = "" if run.epochs is None else f", {run.epochs:g} epochs"
    return (
        f"{plural(run.steps, 'step')}, batch size {run.batch_size}, {plural(run.examples, 'example')}{epochs}"
        f", seed {run.seed}"
    )


def _forgetting(run: Record) -> str:
    if run.forgetting is None:
        return ""
    return f"{run.forgetting:+.4g} nats per token" + (f" on {run.forgetting_text}" if run.forgetting_text else "")


def _peak_memory(run: Record) -> str:
    if run.peak_memory_bytes is None:
        return ""
    includes = f" ({run.peak_memory_includes})" if run.peak_memory_includes else ""
    return show_bytes(run.peak_memory_bytes) + includes


def _moment(time: datetime.datetime | None) -> str:
    return "" if time is None else time.isoformat(sep=" ", timespec="seconds")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) if values else ""


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _labels(labels: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(labels[:limit])
    return f"{shown} and {len(labels) - limit} more" if len(labels) > limit else shown
