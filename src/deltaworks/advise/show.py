"""Advice for people, for programs (JSON), and as the recipe that ``deltaworks tune`` runs."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deltaworks.advise.advice import SIZES, Advice, Adviser, Change, Option
from deltaworks.advise.evidence import read_own
from deltaworks.advise.rules import rule_book
from deltaworks.advise.wishes import parse_wishes
from deltaworks.compare.wording import join, plural, show_bytes, show_count, show_seconds
from deltaworks.core.registry import registry
from deltaworks.store.files import write_atomically
from deltaworks.store.records import plain
from deltaworks.train.recipe import Recipe, parse_recipe

WIDTH = 100


def print_advice(
    wanted: Mapping[str, Any], *, records: Path | None = None, write: Path | None = None, as_json: bool = False
) -> None:
    """Advise on wishes as ``parse_wishes`` reads them, print the answer, and write the recipe of the best option.

    Raises UserError for wrong wishes, where nothing fits, and where the file cannot be written.
    """
    from deltaworks.advise.estimate import estimate

    wishes = parse_wishes(wanted)
    advice = Adviser(estimate, read_own(records) if records else ()).advise(wishes)
    print(as_data(advice) if as_json else "\n".join(lines(advice)))
    if write is not None:
        write_recipe(advice, write)
        if not as_json:
            print(f"\nwrote {write}; to train: deltaworks tune {write}" + ("" if wishes.data else " data=YOURS"))


# ---- for people


def lines(advice: Advice) -> Iterator[str]:
    """The advice as lines of at most 100 letters: rules that gave points or settings, the rest is in the JSON."""
    yield from _wrapped(_situation(advice))
    for conflict in advice.conflicts:
        yield from _wrapped(f"! {conflict}", hang="  ")
    for note in advice.notes:
        if note.settings:
            yield from _wrapped(f"{note.text} ({note.rule})")
    for number, option in enumerate(advice.options, start=1):
        yield ""
        yield f"{number}  {_named(option)}{_held(option)}"
        yield from _wrapped(", ".join(_needs(option)), "   ", "     ")
        yield from _wrapped(", ".join(_tried(option)), "   ", "     ")
        for reason in option.reasons:
            if reason.points:
                sign = "+" if reason.points > 0 else "-"
                yield from _wrapped(f"{sign} {reason.text} ({reason.rule})", "   ", "     ")
    if advice.excluded:
        yield ""
        yield "not advised"
        for title, names in _grouped(advice).items():
            yield from _wrapped(f"{title}: {join(names)}", "   ", "     ")
    named = {option.method for option in advice.options} | {out.method for out in advice.excluded}
    others = sum(name not in named for name in registry())
    yield f"less or nothing speaks for the {others} others: compare them on your data"
    if advice.changes:
        yield ""
        yield "what would change the first choice"
        for change in advice.changes:
            yield from _wrapped(f"{_condition(change)}: {_instead(change, advice.options[0])}", "   ", "     ")
    yield ""
    yield "sources"
    for rules, source in _sources(advice):
        yield from _wrapped(f"{rules}: {source}", "   ", "     ")


def _wrapped(text: str, indent: str = "", hang: str | None = None) -> list[str]:
    rest = indent if hang is None else hang
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _situation(advice: Advice) -> str:
    facts = advice.facts
    told = [
        f"{facts['model']} with {show_count(facts['parameters'])} parameters",
        facts["task"],
        "" if facts["examples"] is None else plural(facts["examples"], "example"),
        f"{show_bytes(facts['memory'])} of memory",
        f"batches of {facts['batch']} x {facts['length']} tokens",
        f"{plural(facts['trials'], 'trial')} of {facts['epochs']:g} epochs",
        "" if facts["storage"] is None else f"at most {show_bytes(facts['storage'])} stored",
        "merged" if facts["merge"] else "",
        "" if facts["adapters_served"] == 1 else f"{facts['adapters_served']} adapters served",
    ]
    return ", ".join(text for text in told if text)


def _held(option: Option) -> str:
    """How the base is held, where it is not as usual."""
    settings = option.settings
    dtype = settings.get("quantize") or settings["dtype"]
    held = "" if dtype == "float32" else f", base in {dtype}"
    return held + (", with checkpointing" if settings.get("checkpointing") else "")


def _named(option: Option) -> str:
    """The spec, with the rank or length also where it is the usual one."""
    if "[" in option.spec:
        return option.spec
    sizes = [f"{key}={option.options[key]}" for key in SIZES if key in option.options]
    return f"{option.spec}[{', '.join(sizes)}]" if sizes else option.spec


def _needs(option: Option) -> Iterator[str]:
    def beside(measured: float | None, show: Callable[[float], str]) -> str:
        return f" (your runs, with rows of theirs: {show(measured)})" if measured else ""

    yield f"{show_bytes(option.peak_bytes)} of memory" + beside(option.measured_peak_bytes, show_bytes)
    yield f"{show_bytes(option.stored_bytes)} stored"
    if option.seconds is None:
        yield f"{show_seconds(option.step_seconds)} a step"
    else:
        took = show_seconds(option.seconds) + beside(option.measured_seconds, show_seconds)
        yield f"{took} for {plural(len(option.rates), 'run')} of {plural(option.steps or 0, 'step')}"


def _tried(option: Option) -> Iterator[str]:
    if option.options.get("targets"):
        yield f"on {option.options['targets']}"
    yield f"learning rates {', '.join(f'{rate:g}' for rate in option.rates)}"


def _grouped(advice: Advice) -> dict[str, list[str]]:
    """Methods that are out, by rule; each once."""
    titles = {rule.id: f"{rule.title} ({rule.id})" for rule in rule_book().rules}
    titles |= {
        "memory": f"more than {show_bytes(advice.facts['memory'])}, whatever is saved",
        "storage": f"more than {show_bytes(advice.facts['storage'] or 0)} stored",
        "model": "nothing to tune in this model",
    }
    groups: dict[str, list[str]] = {}
    seen = set()
    for out in advice.excluded:
        if out.method not in seen:
            groups.setdefault(titles[out.rule], []).append(out.method)
            seen.add(out.method)
    return groups


def _condition(change: Change) -> str:
    then, now = change.then, change.now
    if change.wish == "merge":
        return "where the result must be merged" if then else "where it need not be merged"
    if change.wish in ("memory", "storage"):
        what = "memory" if change.wish == "memory" else "storage"
        if now is None or then < now:
            return f"with less than {show_bytes(then + 1)} of {what}"
        return f"with {show_bytes(then)} of {what}"
    noun = "adapters served" if change.wish == "adapters_served" else change.wish
    return f"with {then:,g} {noun if then != 1 else noun.removesuffix('s')} instead of {now:,g}"


def _instead(change: Change, best: Option) -> str:
    if change.option is None:
        return "nothing fits"
    same, held = change.option.spec == best.spec, _held(change.option)
    if same:
        return "the same" + (held or ", base in float32")
    return _named(change.option) + held


def _sources(advice: Advice) -> Iterator[tuple[str, str]]:
    """The sources of the rules that are named, each once."""
    named = {reason.rule: reason.source for option in advice.options for reason in option.reasons if reason.points}
    named |= {note.rule: note.source for note in advice.notes if note.settings}
    by_source: dict[str, list[str]] = {}
    for rule in rule_book().rules:
        if rule.id in named:
            by_source.setdefault(named[rule.id], []).append(rule.id)
    for source, rules in by_source.items():
        yield ", ".join(rules), source


# ---- for programs


def as_data(advice: Advice) -> str:
    """All of it as JSON."""

    def data(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {each.name: data(getattr(value, each.name)) for each in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: data(item) for key, item in value.items()}
        return [data(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(data(advice)), indent=1, ensure_ascii=False, allow_nan=False)


# ---- for training


def recipe_of(advice: Advice) -> Recipe:
    """The recipe of the best option."""
    option, wishes = advice.options[0], advice.wishes
    values = {
        "model": wishes.model,
        "data": wishes.data,
        "method": option.spec,
        "task": wishes.task,
        "batch_size": wishes.batch,
        "max_length": wishes.length,
        "epochs": option.settings["epochs"],
        "rates": list(option.rates),
        "dtype": option.settings["dtype"],
        "quantize": option.settings.get("quantize"),
        "gradient_checkpointing": option.settings.get("checkpointing"),
        "out": "runs/advised",
    }
    return parse_recipe({key: value for key, value in values.items() if value is not None}, "the advised recipe")


def write_recipe(advice: Advice, path: Path) -> None:
    """Write the recipe of the best option, with the reasons as comments. Raises UserError for a bad path."""
    import yaml

    recipe = recipe_of(advice)
    why: Iterable[str] = (f"{reason.text} ({reason.rule})" for reason in advice.options[0].reasons)
    head = "".join(f"# {line}\n" for reason in why for line in textwrap.wrap(reason, WIDTH))
    body = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_atomically(path, head + body)
