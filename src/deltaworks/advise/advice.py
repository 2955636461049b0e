"""Advice: the rules, the estimator and the user's own records, made into a ranked short list."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaworks.advise.evidence import findings
from deltaworks.advise.rules import Book, holds, rule_book
from deltaworks.advise.standing import Excluded, Reason, Standing, standings
from deltaworks.advise.wishes import Wishes
from deltaworks.compare.wording import join, show_bytes
from deltaworks.core.errors import UserError
from deltaworks.core.registry import Config, configure, methods
from deltaworks.store.records import Record

Estimator = Callable[..., Any]

USUAL_EPOCHS = 3.0
SIZES = ("rank", "length")  # options that are halved until an adapter fits the storage
TIES = 12  # most methods beyond the list that are estimated: equal points, or nothing fits


@dataclass(frozen=True)
class Option:
    """A method with its whole configuration, and what it takes: bytes, seconds.

    ``settings`` are dtype, quantize, checkpointing and epochs; ``seconds`` is for a run at each of the rates, None
    where the number of examples is not known.
    """

    method: str
    spec: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    rates: Sequence[float]
    points: int
    peak_bytes: int
    stored_bytes: int
    trainable: int
    step_seconds: float
    steps: int | None
    seconds: float | None
    reasons: Sequence[Reason]
    measured_peak_bytes: float | None  # in the user's own runs of the same model, in batches of as many rows
    measured_seconds: float | None  # at the throughput of these runs

    @property
    def answer(self) -> tuple[Any, ...]:
        """What makes it another advice: the configuration and how the base is held."""
        return (self.spec, *sorted((key, value) for key, value in self.settings.items() if key != "epochs"))


@dataclass(frozen=True)
class Change:
    """One wish with another value, and the best method then; None where nothing fits."""

    wish: str
    now: Any
    then: Any
    option: Option | None


@dataclass(frozen=True)
class Advice:
    """The answer: options best first, what is out, wishes that contradict each other, what would change the answer."""

    wishes: Wishes
    facts: Mapping[str, Any]
    options: Sequence[Option]
    excluded: Sequence[Excluded]
    conflicts: Sequence[str]
    notes: Sequence[Reason]
    changes: Sequence[Change] = ()


class Adviser:
    """Answers wishes; estimates are kept, so that the same question under other wishes costs little.

    Args:
        estimate: ``deltaworks.advise.estimate.estimate`` or what answers like it.
        records: Runs of the user's own.
        book: The rules; default: those of the package.
    """

    def __init__(self, estimate: Estimator, records: Sequence[Record] = (), book: Book | None = None) -> None:
        self.records, self.book = records, book or rule_book()
        self._estimate = functools.cache(estimate)

    def advise(self, wishes: Wishes, show: int = 4) -> Advice:
        """The ``show`` best methods that fit, and what would change the first of them.

        Raises UserError where the model or a method is not known, or nothing fits.
        """
        from deltaworks.advise.changes import changes

        advice = self.judge(wishes, show)
        return replace(advice, changes=changes(self, advice))

    def judge(self, wishes: Wishes, show: int) -> Advice:
        """The list alone."""
        facts = self.situation(wishes)
        pool = standings(findings(self.records, facts["parameters"], facts["task"], wishes.storage))
        notes = self._ask(facts, wishes, pool)
        asked = _asked(wishes, pool)
        rungs = self.rungs(facts)
        self._refuse_too_small(wishes, facts, rungs[-1])
        options = self._fitting(asked, wishes, facts, rungs, show) or self._fitting(pool, wishes, facts, rungs, show)
        if not options:
            out = {excluded.rule for each in pool for excluded in each.excluded}
            if wishes.storage is not None and "storage" in out and "memory" not in out:
                raise UserError(f"no adapter fits in {show_bytes(wishes.storage)}: give more --storage")
            raise UserError(
                f"no method fits in {show_bytes(facts['memory'])} at {wishes.batch} rows of {wishes.length} tokens: "
                f"give a smaller --batch or --length"
            )
        conflicts = [conflict.says.format_map(facts) for conflict in self.book.conflicts if holds(conflict.when, facts)]
        if wishes.methods:
            conflicts += _refusals(asked)
        return Advice(wishes, facts, options, [out for each in pool for out in each.excluded], conflicts, notes)

    def estimate(self, wishes: Wishes, spec: str, rung: Mapping[str, Any]) -> Any:
        """What a method takes in the settings of a rung. Raises UserError where the model has no place for it."""
        return self._estimate(
            wishes.model,
            spec,
            batch=wishes.batch,
            length=wishes.length,
            task=wishes.task,
            hardware=wishes.hardware,
            labels=wishes.labels,
            **rung,
        )

    def situation(self, wishes: Wishes) -> dict[str, Any]:
        """The facts that conditions may name: the wishes, and what the estimator says of the baselines."""
        plain = {"dtype": wishes.dtype or "float32"}
        full = self.estimate(wishes, "full", plain)
        memory, storage = wishes.memory or full.memory_bytes, wishes.storage or math.inf
        facts = {
            **wishes.model_dump(),
            "task": full.task,
            "memory": memory,
            "epochs": wishes.epochs or USUAL_EPOCHS,
            "parameters": full.parameters,
            "storage_share": storage / (4 * full.parameters),
            "weights_over_memory": 2 * full.parameters / memory,
            "full_over_memory": full.peak_bytes / memory,
            "memory_over_hardware": memory / full.memory_bytes if wishes.hardware else None,
            "hardware_has": show_bytes(full.memory_bytes),
        }
        try:
            lora = self.estimate(wishes, "lora", plain)
        except UserError:  # a model without linear layers
            return facts | dict.fromkeys(("lora_over_memory", "lora_over_storage", "activation_share"))
        return facts | {
            "lora_over_memory": lora.peak_bytes / memory,
            "lora_over_storage": lora.stored_bytes / storage,
            "activation_share": lora.activation_bytes / lora.peak_bytes,
        }

    def _ask(self, facts: dict[str, Any], wishes: Wishes, pool: Iterable[Standing]) -> list[Reason]:
        """Go through the rules: standings take what follows for them, settings become facts. Returns the notes."""
        notes = []
        for rule in self.book.rules:
            for effect in rule.effects if holds(rule.when, facts) else ():
                if not holds(effect.when, facts):
                    continue
                if effect.methods is not None:
                    for standing in pool:
                        if holds(effect.methods, standing.facts):
                            standing.take(rule, effect, facts)
                elif all(getattr(wishes, key) is None for key in effect.settings):  # what the user set stays
                    facts |= effect.settings
                    text = effect.reason.format_map(facts)
                    notes.append(Reason(rule.id, rule.title, text, rule.source, settings=effect.settings))
        return notes

    def rungs(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The settings that save more and more memory, with the dtype and quantization that the facts fix, if any."""
        fixed = {key: facts[key] for key in ("dtype", "quantize") if facts[key] is not None}
        rungs: list[dict[str, Any]] = []
        for saving in self.book.savings:
            if ("quantize" in saving or "quantize" not in fixed) and (rung := saving | fixed) not in rungs:
                rungs.append(rung)
        return rungs

    def _refuse_too_small(self, wishes: Wishes, facts: Mapping[str, Any], smallest: Mapping[str, Any]) -> None:
        """Raises UserError where the frozen base alone is too large, however it is held."""
        if facts["lora_over_memory"] is None or facts["lora_over_memory"] <= 1:
            return
        base = self.estimate(wishes, "lora", smallest)
        if base.weight_bytes > facts["memory"]:
            held = f" in {base.quantize}" if base.quantize else ""
            raise UserError(
                f"the frozen base alone takes {show_bytes(base.weight_bytes)}{held}, more than the memory of "
                f"{show_bytes(facts['memory'])}: choose a smaller model"
            )

    def _fitting(
        self,
        pool: Iterable[Standing],
        wishes: Wishes,
        facts: Mapping[str, Any],
        rungs: Sequence[dict[str, Any]],
        show: int,
    ) -> list[Option]:
        """The best that fit. Equal points go to the smaller peak, and what nothing speaks for is a last resort."""
        options: list[Option] = []
        for index, standing in enumerate(sorted((s for s in pool if not s.excluded), key=lambda each: -each.points)):
            if standing.points <= 0 and any(option.points > 0 for option in options):
                break
            if len(options) >= show and standing.points < options[show - 1].points:
                break
            if index >= show + TIES and (options or standing.points <= 0):
                break
            if option := self._option(standing, wishes, facts, rungs):
                options.append(option)
                options.sort(key=lambda each: (-each.points, each.peak_bytes, each.method))
        return options[:show]

    def _option(
        self, standing: Standing, wishes: Wishes, facts: Mapping[str, Any], rungs: Sequence[dict[str, Any]]
    ) -> Option | None:
        """The method in the first settings that fit; None where there are none, which its standing tells."""
        try:
            config = self._stored_within(standing.config(), wishes, rungs[0])
            rung, found = self._rung_within(facts["memory"], wishes, str(config), rungs)
        except UserError as error:
            standing.exclude("model", str(error))
            return None
        except _TooLargeError as error:
            standing.exclude(error.limit, str(error))
            return None
        own = standing.finding if standing.finding is not None and standing.finding.base == "same" else None
        speed = own.samples_per_second if own is not None else None
        rates = standing.rates_for(wishes.trials)
        steps = None if wishes.examples is None else math.ceil(wishes.examples * facts["epochs"] / wishes.batch)
        return Option(
            method=standing.name,
            spec=str(config),
            options=config.options(),
            settings={**rung, "epochs": facts["epochs"]},
            rates=rates,
            points=standing.points,
            peak_bytes=found.peak_bytes,
            stored_bytes=found.stored_bytes,
            trainable=found.trainable,
            step_seconds=found.step_seconds,
            steps=steps,
            seconds=None if steps is None else steps * found.step_seconds * len(rates),
            reasons=standing.reasons,
            measured_peak_bytes=own.peak_bytes if own is not None and own.batch == wishes.batch else None,
            measured_seconds=steps * wishes.batch / speed * len(rates) if steps is not None and speed else None,
        )

    def _stored_within(self, config: Config, wishes: Wishes, rung: Mapping[str, Any]) -> Config:
        """The configuration, its size halved until the saved adapter is within the storage. Raises _TooLargeError."""
        if wishes.storage is None:
            return config
        for smaller in sizes(config):
            stored = self.estimate(wishes, str(smaller), rung).stored_bytes
            if stored <= wishes.storage:
                return smaller
        raise _TooLargeError("storage", f"it stores {show_bytes(stored)} at the least")

    def _rung_within(
        self, memory: int, wishes: Wishes, spec: str, rungs: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, Any], Any]:
        """The first settings that fit, and what they take. Raises _TooLargeError where there are none."""
        found = self.estimate(wishes, spec, rungs[0])
        if found.peak_bytes <= memory:
            return rungs[0], found
        least = self.estimate(wishes, spec, rungs[-1])
        if least.peak_bytes > memory:  # what saves most is asked early: it spares the others
            raise _TooLargeError("memory", f"it needs {show_bytes(least.peak_bytes)}, whatever is saved")
        for rung in rungs[1:]:
            found = self.estimate(wishes, spec, rung)
            if found.peak_bytes <= memory:
                break
        return rung, found


def sizes(config: Config) -> Iterator[Config]:
    """A configuration, then the same with its size halved again and again, where it has one."""
    yield config
    for size in SIZES:
        while (value := config.options().get(size, 0)) > 1:
            config = configure(config, **{size: value // 2})
            yield config


class _TooLargeError(Exception):
    """A method exceeds a limit, the memory or the storage, at its smallest."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


def _asked(wishes: Wishes, pool: list[Standing]) -> list[Standing]:
    """The methods that the user asks for; all where none is named."""
    if wishes.methods is None:
        return pool
    words = [word.strip() for word in wishes.methods.split(",")]
    if not all(words):
        raise UserError(f"--methods {wishes.methods!r} has an empty part between commas")
    names = {name for word in words for name in methods(word)}
    return [each for each in pool if each.name in names]


def _refusals(asked: Iterable[Standing]) -> list[str]:
    """One sentence for the methods that were asked for and are out for the same reasons."""
    alike: dict[str, list[str]] = {}
    for standing in asked:
        if standing.excluded:
            why = "; ".join(f"{out.reason} ({out.rule})" for out in standing.excluded)
            alike.setdefault(why, []).append(standing.name)
    return [f"you ask for {join(names)}, but {why}" for why, names in alike.items()]
