"""What waits for what: a search with the first seed for the others, worlds, resumption, and rows for what cannot run.

The runs are made in this process, by an engine that does it at once.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_data import SETTINGS, write_letters

from deltaworks.compare import run as running
from deltaworks.compare.jobs import Engine, Event, Job
from deltaworks.compare.protocols import Protocol
from deltaworks.compare.run import Outcome
from deltaworks.compare.standings import compare as sort_records
from deltaworks.core.errors import UserError
from deltaworks.store.records import read_records
from deltaworks.train.loop import train
from deltaworks.train.recipe import Recipe

RATES = [1e-2, 3e-2]


class AtOnce(Engine):
    """Trains where it stands; ``fails`` says for which recipes it does not, ``hangs`` for which nothing ever comes."""

    capacity = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Recipe] = []
        self.events: list[Event] = []
        self.closed = False

    fails: Callable[[Recipe], bool] = staticmethod(lambda recipe: False)
    hangs: Callable[[Recipe], bool] = staticmethod(lambda recipe: False)

    def start(self, job: Job, recipe: Recipe) -> None:
        self.started.append(recipe)
        if type(self).hangs(recipe):
            return
        if type(self).fails(recipe):
            self.events.append(Event(job, {"event": "failed", "message": "no luck"}))
        else:
            train(recipe, data=job.data, tell=lambda said: self.events.append(Event(job, said))).write(
                self.folder / "records"
            )
        self.events.append(Event(job, None))

    def heard(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def stop(self, jobs: Sequence[Job]) -> None:
        self.events += [Event(job, None) for job in jobs]

    def close(self) -> None:
        self.closed = True


class Comparison:
    """Runs a protocol in one folder, as often as asked."""

    def __init__(self, folder: Path, engine: type[AtOnce]) -> None:
        self.folder, self.kind = folder, engine
        self.engine: AtOnce | None = None

    def __call__(self, protocol: Protocol) -> tuple[Outcome, str, list[Recipe]]:
        with open(self.folder.with_suffix(".txt"), "w+") as stream:
            outcome = running.compare(protocol, self.folder, console=Console(file=stream, width=200))
            stream.seek(0)
            return outcome, stream.read(), self.engine.started if self.engine else []

    def made(self, name: str, folder: Path, workers: int, keep_adapters: bool) -> AtOnce:
        self.engine = self.kind(folder)
        return self.engine


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    class Mine(AtOnce):
        pass

    made = Comparison(tmp_path / "out", Mine)
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(running, "engine_of", made.made)
    return made


def protocol(tmp_path: Path, *methods: str, seeds: int = 3, worlds: Any = ({},), **settings: Any) -> Protocol:
    recipe = {**SETTINGS, "data": str(write_letters(tmp_path)), "rates": RATES, **settings}
    return Protocol(methods=methods, seeds=tuple(range(seeds)), search="first", settings=recipe, worlds=worlds)


def test_the_first_seed_searches_for_the_others(comparison: Comparison, tmp_path: Path) -> None:
    outcome, _, started = comparison(protocol(tmp_path, "lora[rank=2]", "bitfit"))
    assert [recipe.seed for recipe in started[:2]] == [0, 0]
    assert [len(record.learning_rates) for record in outcome.records] == [2, 2, 1, 1, 1, 1]
    chosen = {record.method: record.learning_rate for record in outcome.records if record.seed == 0}
    assert set(chosen.values()) <= set(RATES)
    for record in outcome.records[2:]:
        assert (record.searched_on, record.learning_rate) == (0, chosen[record.method])
    for recipe in started[2:]:
        assert recipe.chosen_rate == chosen[recipe.method]
    # to the report they are repetitions of one another
    (found,) = sort_records(outcome.records)
    assert [len(entry.runs) for entry in found.entries] == [3, 3]
    assert comparison.engine is not None
    assert comparison.engine.closed
    # the whole cost of the comparison lies in its records
    assert all(record.processor_seconds and record.wall_seconds for record in outcome.records)


def test_a_run_follows_its_search_and_not_the_others(comparison: Comparison, tmp_path: Path) -> None:
    comparison.kind.capacity = 1
    comparison.kind.fails = staticmethod(lambda recipe: recipe.method == "bitfit")
    outcome, shown, started = comparison(protocol(tmp_path, "bitfit", "lora[rank=2]", seeds=2))
    assert [(recipe.method, recipe.seed) for recipe in started] == [
        ("bitfit", 0),
        ("lora[rank=2]", 0),
        ("lora[rank=2]", 1),
    ]
    assert [record.status for record in outcome.records] == ["failed", "finished", "failed", "finished"]
    assert outcome.records[0].message == "no luck"
    assert outcome.records[2].message == "not run, since the search with seed 0 failed: no luck"
    assert "[4/4]" in shown
    # what failed is made again, and what waited for it then runs
    comparison.kind.fails = staticmethod(lambda recipe: False)
    outcome, shown, started = comparison(protocol(tmp_path, "bitfit", "lora[rank=2]", seeds=2))
    assert "2 of 4 runs are finished already" in shown
    assert [(recipe.method, recipe.seed) for recipe in started] == [("bitfit", 0), ("bitfit", 1)]
    assert {record.status for record in outcome.records} == {"finished"}


def test_a_search_that_diverged_leaves_rows_that_say_so(comparison: Comparison, tmp_path: Path) -> None:
    wild = protocol(tmp_path, "lora[rank=2]", rates=[1e6, 1e7], steps=5)
    outcome, _, started = comparison(wild)
    assert len(started) == 1
    assert [record.status for record in outcome.records] == ["diverged", "failed", "failed"]
    for record in outcome.records[1:]:
        assert record.message.startswith("not run, since the search with seed 0 diverged: the loss became")
        assert record.wall_seconds is None
    # the search is not made again
    again, shown, _ = comparison(wild)
    assert "1 of 3 runs are finished already" in shown
    assert again.records[0] == outcome.records[0]
    assert len(read_records(comparison.folder / "records")) == 3


def test_later_seeds_join_a_finished_search(comparison: Comparison, tmp_path: Path) -> None:
    first, _, _ = comparison(protocol(tmp_path, "lora[rank=2]", seeds=1))
    outcome, shown, started = comparison(protocol(tmp_path, "lora[rank=2]", seeds=2))
    assert "1 of 2 runs are finished already" in shown
    assert [recipe.seed for recipe in started] == [1]
    assert outcome.records[0] == first.records[0]
    assert started[0].chosen_rate == first.records[0].learning_rate
    # a run that searches by itself is another one
    each = protocol(tmp_path, "lora[rank=2]", seeds=2).model_copy(update={"search": "each"})
    outcome, shown, started = comparison(each)
    assert "1 of 2 runs are finished already" in shown
    assert [len(record.learning_rates) for record in outcome.records] == [2, 2]


def test_worlds_are_told_apart(comparison: Comparison, tmp_path: Path) -> None:
    worlds = [
        {"model": ["tiny_models:classifier", "tiny_models:larger"]},
        {"methods": "ia3[targets=linear]", "limit": 60},
    ]
    outcome, shown, _ = comparison(protocol(tmp_path, "bitfit", seeds=1, worlds=worlds))
    assert [(record.method, record.data.sizes["train"]) for record in outcome.records] == [
        ("bitfit", 102), ("bitfit", 102), ("ia3[targets=linear]", 48),
    ]  # fmt: skip
    assert "letters with tiny_models:larger: bitfit" in shown
    assert len(sort_records(outcome.records)) == 3


def test_a_run_that_takes_too_long_is_stopped(comparison: Comparison, tmp_path: Path) -> None:
    comparison.kind.hangs = staticmethod(lambda recipe: recipe.method == "bitfit")
    limited = protocol(tmp_path, "bitfit", "lora[rank=2]", seeds=1).model_copy(update={"run_seconds": 0.2})
    began = time.monotonic()
    outcome, _, _ = comparison(limited)
    assert time.monotonic() - began < 30
    assert [record.status for record in outcome.records] == ["failed", "finished"]
    assert outcome.records[0].message == "stopped after 0.2 seconds, the limit of the comparison"
    assert outcome.records[0].wall_seconds is not None
    assert outcome.records[0].wall_seconds >= 0.2


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine 'rays' is unknown: did you mean 'ray'"):
        running.compare(protocol(tmp_path, "bitfit"), tmp_path / "out", engine="rays")
    assert not (tmp_path / "out" / "records").exists()
