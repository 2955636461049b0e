"""The search over rates: what another seed chose, and halving."""

from pathlib import Path
from typing import Any

import pytest
from small_data import SETTINGS, write_letters

from deltaworks.core.errors import UserError
from deltaworks.store.records import Record
from deltaworks.train.fitting import Attempt
from deltaworks.train.loop import train
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.recording import facts_of
from deltaworks.train.search import Halving, choose, from_the_middle, search
from deltaworks.train.stage import Stage, prepare

RATES = [1e-6, 1e-2, 1e6]


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(Path(__file__).parent)
    return {**SETTINGS, "data": str(write_letters(tmp_path)), "ranks": False}


def run(letters: dict[str, Any], **changes: Any) -> Record:
    return train(parse_recipe({**letters, **changes}))


def test_a_run_at_the_rate_of_another_seed(letters: dict[str, Any]) -> None:
    record = run(letters, rates=RATES, seed=1, searched_on=0, chosen_rate=1e-2)
    assert record.searched_on == 0
    assert [trial.rate for trial in record.learning_rates] == [1e-2]
    assert record.learning_rate == 1e-2
    assert record.learning_rate_split == "validation"
    assert record.config["schedule"]["rates"] == RATES  # type: ignore[index, call-overload]
    alone = run(letters, rates=[1e-2], seed=1)
    assert alone.curve == record.curve
    assert alone.searched_on is None
    assert alone.run_id != record.run_id


def test_the_key_is_known_before_the_search_has_ended(letters: dict[str, Any]) -> None:
    def key(**changes: Any) -> str:
        recipe = parse_recipe({**letters, "rates": RATES, **changes})
        return str(facts_of(recipe, recipe.config(), stage.data, stage.loaded, 20)["run_id"])

    stage = prepare(parse_recipe(letters))
    first = key(seed=1, searched_on=0)
    assert key(seed=1, searched_on=0, chosen_rate=1e-2) == key(seed=1, searched_on=0, chosen_rate=1e6) == first
    assert len({first, key(seed=1), key(seed=1, searched_on=2), key(seed=2, searched_on=0)}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"searched_on": 0}, "searched_on=0 is the seed of this run"),
        ({"chosen_rate": 1e-2}, "add searched_on"),
        ({"searched_on": 1}, "give it as chosen_rate"),
        ({"searched_on": 1, "chosen_rate": 2e-2}, r"chosen_rate=0\.02 is not among the rates tried: 0\.01"),
    ],
)
def test_a_rate_that_nobody_chose(letters: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(letters, **changes)


# ---- halving ----------------------------------------------------------------------------------------------


def test_halving_saves_steps_and_finds_the_rate_of_the_grid(letters: dict[str, Any], tmp_path: Path) -> None:
    """Of five rates two are far too small: they stop after a third of the steps."""
    problem = {**letters, "rates": [1e-6, 1e-1, 1e-2, 3e-2, 1e-7], "steps": 45, "curve_points": 9}
    grid = run(problem)
    halving = train(parse_recipe({**problem, "search": "halving"}), adapter=tmp_path / "adapter")
    assert halving.learning_rate == grid.learning_rate
    assert halving.test == grid.test
    assert halving.curve == grid.curve
    assert [trial.rate for trial in halving.learning_rates] == [1e-7, 1e-6, 1e-2, 3e-2, 1e-1]
    stopped = {trial.rate: trial.stopped_at for trial in halving.learning_rates}
    assert all(stopped[rate] == 15 for rate in (1e-7, 1e-6))
    assert stopped[halving.learning_rate or 0] is None
    assert all(trial.stopped_at is None for trial in grid.learning_rates)
    taken = sum(steps or 45 for steps in stopped.values())
    assert taken <= 0.75 * 5 * 45
    again = run(problem, search="halving")
    assert again.learning_rates == halving.learning_rates
    assert again.run_id == halving.run_id != grid.run_id


def test_the_first_rung_is_a_third_and_earlier_for_more_trials() -> None:
    def asked(trials: int, points: int) -> list[int]:
        """Curve points at which a trial that is the worst would end, behind one that went through."""
        halving = Halving(trials, points)
        first = halving.trial()
        assert not any(first(point, 0.9) for point in range(1, points))
        second = halving.trial()
        return [point for point in range(1, points) if second(point, 0.1)]

    assert asked(2, 9)[0] == asked(3, 9)[0] == asked(8, 9)[0] == 3
    assert asked(9, 9)[0] == 1
    assert asked(9, 27)[0] == 3


def test_a_trial_as_good_as_the_best_goes_on() -> None:
    halving = Halving(3, 9)
    trials = [halving.trial() for _ in range(3)]
    assert not trials[0](3, 0.5)
    assert not trials[1](3, 0.5)
    assert trials[2](3, 0.4999)


def test_the_best_that_was_given_up_has_its_turn_again_where_the_others_diverge(
    letters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle rate leads at the first rung and diverges later."""
    from deltaworks.train import search as module

    def fit(stage: Stage, delta: Any, trial: Attempt, tell: Any, stops: Any) -> None:
        early, late = {1e-3: (0.5, 0.6), 1e-2: (0.9, None), 1e-1: (0.4, 0.7)}[trial.rate]
        if stops(1, early):
            trial.stopped_at, trial.score = 5, early
        elif late is None:
            trial.diverged = "the loss became nan"
        else:
            trial.score = late

    monkeypatch.setattr(module, "fit", fit)
    stage = prepare(parse_recipe({**letters, "rates": [1e-3, 1e-2, 1e-1], "search": "halving", "curve_points": 3}))
    trials = search(stage, Path(letters["data"]).parent / "adapter", lambda event: None)
    assert [trial.stopped_at for trial in trials] == [None, None, 5]
    assert choose(trials).rate == 1e-3
    assert choose(trials).score == 0.6


def test_the_middle_comes_first() -> None:
    assert from_the_middle([1, 2, 3]) == [2, 1, 3]
    assert from_the_middle([1, 2, 3, 4]) == [2, 3, 1, 4]


def test_halving_needs_scores_on_the_way(letters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="curve_points of at least 2"):
        run(letters, search="halving", curve_points=1)
