"""A method while the rules are asked: its points, its reasons, the options and rates that the rules give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaworks.advise.candidates import Candidate, candidates, composed
from deltaworks.advise.evidence import NOTHING, Finding
from deltaworks.advise.rules import Effect, Rule
from deltaworks.core.errors import UserError
from deltaworks.core.registry import Config, configure

ALIKE = 1.2  # rates nearer to each other than by this factor are one


@dataclass(frozen=True)
class Reason:
    """A rule that fired, with the points that it gave a method, or the settings that it gave the run."""

    rule: str
    title: str
    text: str
    source: str
    points: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Excluded:
    """A method that is out, and why; ``rule`` is a rule's id, or "memory", "storage" or "model"."""

    method: str
    rule: str
    reason: str


@dataclass
class Standing:
    """A candidate with what the rules and the user's records say of it."""

    candidate: Candidate
    finding: Finding | None = None
    points: int = 0
    reasons: list[Reason] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    more_rates: list[float] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that rules may ask of a method."""
        return {**self.candidate.facts, **(NOTHING if self.finding is None else self.finding.facts())}

    def take(self, rule: Rule, effect: Effect, situation: Mapping[str, Any]) -> None:
        """What follows from a rule that fired."""
        text = effect.reason.format_map({**situation, **self.facts})
        self.reasons.append(Reason(rule.id, rule.title, text, rule.source, effect.points))
        self.points += effect.points
        self.options |= effect.options
        self.rates = effect.rates or self.rates
        self.more_rates += effect.more_rates
        if effect.never:
            self.exclude(rule.id, text)

    def exclude(self, rule: str, reason: str) -> None:
        """Take the method out."""
        self.excluded.append(Excluded(self.name, rule, reason))

    def config(self) -> Config:
        """The configuration that led the user's own runs of the same model, or else the usual one as the rules say."""
        if self.finding is not None and self.finding.base == "same" and self.finding.record == "leader":
            return configure(self.finding.spec)
        config = configure(self.name)
        own = config.options()
        return configure(config, **{key: value for key, value in self.options.items() if key in own})

    def rates_for(self, trials: int) -> list[float]:
        """As many learning rates as there are trials, ascending: those nearest to the likeliest one."""
        config = self.candidate.config
        if self.finding is not None and self.finding.rate is not None:
            likely = self.finding.rate
            pool = {likely * factor for factor in (1 / 9, 1 / 3, 1, 3, 9)}
        else:
            usual = sorted(self.rates or {config.learning_rate, *config.tried})
            likely = usual[len(usual) // 2] if self.rates else config.learning_rate
            pool = {*usual, *self.more_rates}
        chosen: list[float] = []
        for rate in sorted(pool, key=lambda rate: (abs(math.log(rate / likely)), rate)):
            if all(max(rate / other, other / rate) > ALIKE for other in chosen):
                chosen.append(float(f"{rate:.2g}"))
        return sorted(chosen[:trials])


def standings(own: Mapping[str, Finding]) -> list[Standing]:
    """Every registered method, and the compositions among the user's own runs."""
    known = {each.name: each for each in candidates()}
    found = [Standing(each, own.get(name)) for name, each in known.items()]
    for spec in own.keys() - known.keys():
        try:
            found.append(Standing(composed(spec), own[spec]))
        except (UserError, KeyError):  # a run of a method that is not registered here
            continue
    return found
