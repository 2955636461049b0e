"""Decision rules as data: conditions over named facts, and what follows for methods, options, rates and settings.

A condition maps names of facts to tests, all of which must hold::

    {trials: {at_most: 3}, task: [causal, seq2seq], merge: true}
    {any: [{trials: {at_most: 3}}, {epochs: {at_most: 3}}]}
    {not: {parameters: {at_least: 1.0e10}}}

A test is a value, a list of values (one of them), or bounds. Texts may hold wildcards. Where a fact is a collection,
one member must pass. A fact that is not known (None) passes no test.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

BOUNDS = {
    "at_least": lambda value, bound: value >= bound,
    "at_most": lambda value, bound: value <= bound,
    "above": lambda value, bound: value > bound,
    "below": lambda value, bound: value < bound,
}

Facts = Mapping[str, Any]


def _checked(condition: Any) -> Any:
    """The condition itself. Raises ValueError where it is none."""
    if not isinstance(condition, dict):
        raise ValueError(f"a condition maps facts to tests, this is {condition!r}")
    for name, test in condition.items():
        if name == "any":
            for part in test:
                _checked(part)
        elif name == "not":
            _checked(test)
        elif isinstance(test, dict) and (not test or not test.keys() <= BOUNDS.keys()):
            raise ValueError(f"{name}: bounds are {', '.join(BOUNDS)}, not {', '.join(test)}")
    return condition


Condition = Annotated[dict[str, Any], BeforeValidator(_checked)]


def holds(condition: Condition, facts: Facts) -> bool:
    """Whether all tests of a condition pass. Raises KeyError for a fact that nobody gives."""
    return all(_holds(name, test, facts) for name, test in condition.items())


def _holds(name: str, test: Any, facts: Facts) -> bool:
    if name == "any":
        return any(holds(part, facts) for part in test)
    if name == "not":
        return not holds(test, facts)
    value = facts[name]
    members = value if isinstance(value, (tuple, list, set, frozenset)) else [value]
    return any(_passes(test, member) for member in members)


def _passes(test: Any, value: Any) -> bool:
    if value is None:
        return False
    if isinstance(test, dict):
        return all(BOUNDS[word](value, bound) for word, bound in test.items())
    if isinstance(test, list):
        return any(_passes(one, value) for one in test)
    if isinstance(test, str):
        return fnmatch.fnmatchcase(str(value), test)
    return bool(test == value)


def names_in(condition: Condition) -> Iterator[str]:
    """The facts that a condition asks for."""
    for name, test in condition.items():
        if name == "any":
            for part in test:
                yield from names_in(part)
        elif name == "not":
            yield from names_in(test)
        else:
            yield name


def bounds_in(condition: Condition) -> Iterator[tuple[str, str, float]]:
    """The bounds that a condition sets: (fact, word, bound)."""
    for name, test in condition.items():
        if name == "any":
            for part in test:
                yield from bounds_in(part)
        elif name == "not":
            yield from bounds_in(test)
        elif isinstance(test, dict):
            yield from ((name, word, bound) for word, bound in test.items())


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Effect(_Part):
    """What follows from a rule; with ``methods`` for the methods that pass, else for the whole run."""

    when: Condition = Field({}, description="over the facts of the situation, beside the rule's own")
    methods: Condition | None = Field(None, description="over the facts of a method")
    points: int = Field(0, description="added to a method's standing")
    never: bool = Field(False, description="the method is out")
    options: dict[str, Any] = Field({}, description="options of the method")
    rates: list[float] = Field([], description="learning rates to search, in place of those the method was tried with")
    more_rates: list[float] = Field([], description="learning rates to search as well")
    settings: dict[str, Any] = Field({}, description="settings of the run, which become facts for later rules")
    reason: str = Field("", description="one sentence, with facts in braces")


class Rule(_Part):
    """One decision rule with the evidence that it rests on."""

    id: str
    title: str
    source: str
    when: Condition = {}
    effects: list[Effect]


class Conflict(_Part):
    """Wishes that cannot both be granted, and the sentence that says so."""

    when: Condition
    says: str


class Book(_Part):
    """All rules, in the order in which they are asked."""

    savings: list[dict[str, Any]] = Field(description="settings that save memory, tried in this order until it fits")
    rules: list[Rule]
    conflicts: list[Conflict]

    def bounds(self, fact: str) -> set[float]:
        """The values of one fact beside which some condition changes, counted in whole numbers."""
        conditions = [c for rule in self.rules for c in (rule.when, *(effect.when for effect in rule.effects))]
        edges = {"at_least": (-1, 0), "below": (-1, 0), "at_most": (0, 1), "above": (0, 1)}
        return {
            bound + step
            for condition in [*conditions, *(conflict.when for conflict in self.conflicts)]
            for name, word, bound in bounds_in(condition)
            if name == fact
            for step in edges[word]
        }


@functools.cache
def rule_book() -> Book:
    """The rules that ship with the package."""
    import yaml

    text = resources.files("deltaworks.advise").joinpath("rules.yaml").read_text(encoding="utf-8")
    return Book.model_validate(yaml.safe_load(text))
