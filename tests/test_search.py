"""The search over rates: what another seed chose, and halving."""

from pathlib import Path
from typing import Any

import pytest
from small_data import SETTINGS, write_letters

from deltaworks.core.errors import UserError
from deltaworks.store.records import Record
from deltaworks.train.loop import train
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.recording import facts_of
from deltaworks.train.stage import prepare

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
