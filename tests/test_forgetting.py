"""Forgetting: the loss on text that is not trained on, before and after."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.store.records import Record
from deltaworks.train.data import load_data
from deltaworks.train.forgetting import ROWS, halved, probe_of
from deltaworks.train.loop import train
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.stage import prepare


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A decoder learns to continue the alphabet; the other text runs backwards."""
    monkeypatch.chdir(Path(__file__).parent)
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    starts = [chance.randrange(16) for _ in range(200)]
    forward = [{"prompt": letters[k : k + 2], "target": letters[k + 2 : k + 4 + n % 5]} for n, k in enumerate(starts)]
    backward = [{"text": f"{letters[k : k + 6][::-1]} {letters[k : k + 4][::-1]} {n}"} for n, k in enumerate(starts)]
    return {
        "data": write_rows(tmp_path / "forward.jsonl", forward),
        "forgetting": write_rows(tmp_path / "backward.jsonl", backward * 2),
        "model": "tiny_decoders:causal",
        "method": "full",
        "steps": 30,
        "batch_size": 8,
        "curve_points": 2,
        "rates": [1e-2],
        "ranks": False,
    }


def run(recipe: dict[str, Any], **changes: Any) -> Record:
    return train(parse_recipe({**recipe, **changes}))


@pytest.mark.parametrize("model", ["causal", "seq2seq"])
def test_what_is_forgotten_is_the_rise_of_the_loss(recipe: dict[str, Any], model: str, tmp_path: Path) -> None:
    task = {"model": f"tiny_decoders:{model}", "task": model}
    record = train(parse_recipe(recipe | task), adapter=tmp_path / "adapter")
    assert record.forgetting_text == f"backward, {ROWS} texts"
    assert record.forgetting is not None
    stage = prepare(parse_recipe(recipe | task))
    assert stage.probe is not None
    before = stage.evaluate(stage.probe.examples)["loss"]
    assert before == pytest.approx(math.log(40), rel=0.2)  # nats per token of an untrained model over 40 letters
    dw.load(stage.model, tmp_path / "adapter")
    assert stage.evaluate(stage.probe.examples)["loss"] - before == pytest.approx(record.forgetting, abs=1e-6)
    assert abs(record.forgetting) > 0.05


def test_watching_a_text_does_not_change_the_training(recipe: dict[str, Any]) -> None:
    watched, unwatched = run(recipe), run(recipe, forgetting="none")
    assert watched.run_id == unwatched.run_id
    assert watched.curve == unwatched.curve
    assert watched.test == unwatched.test
    assert (unwatched.forgetting, unwatched.forgetting_text) == (None, "")


def test_the_text_by_default(recipe: dict[str, Any]) -> None:
    del recipe["forgetting"]
    probe = prepare(parse_recipe(recipe)).probe
    assert probe is not None
    assert probe.name.startswith("stdlib-text of Python 3.")
    assert len(probe.examples) == ROWS
    assert prepare(parse_recipe({**recipe, "data": "stdlib-text", "limit": 64})).probe is None
    letters = parse_recipe({"model": "tiny_models:classifier", "data": "stdlib-docs", "limit": 64})
    assert prepare(letters).probe is None


def test_the_rows_of_the_text_are_the_same_for_every_seed(recipe: dict[str, Any]) -> None:
    probes = [prepare(parse_recipe({**recipe, "seed": seed, "data_seed": seed})).probe for seed in (0, 1)]
    assert probes[0] == probes[1]


def test_texts_that_cannot_be_watched(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="what is trained on"):
        run(recipe, forgetting=recipe["data"])
    with pytest.raises(UserError, match="absent"):
        run(recipe, forgetting=str(tmp_path / "absent.jsonl"))
    classes = parse_recipe({"model": "tiny_models:classifier", "data": "stdlib-docs", "forgetting": "stdlib-text"})
    with pytest.raises(UserError, match="'classification' leave it out"):
        probe_of(classes, prepare(classes.model_copy(update={"forgetting": None})).task)


def test_a_text_in_halves() -> None:
    assert halved({"text": "one two three"}) == {"prompt": "one two", "target": "three"}
    assert halved({"prompt": "a b", "target": "c"}) == {"prompt": "a b", "target": "c"}


def test_scores_of_tokens_are_kept_with_their_weights(recipe: dict[str, Any]) -> None:
    record = run(recipe, forgetting="none")
    test = record.test
    assert test is not None
    assert test.score is not None
    assert test.correct is None
    rows = load_data(recipe["data"]).test
    assert test.weights == [len(row["target"]) + 1 for row in rows]  # the letters and the end
    assert len(set(test.weights)) > 1
    scores, weights = torch.tensor(test.values), torch.tensor(test.weights)
    assert float((scores * weights).sum() / weights.sum()) == pytest.approx(test.score, abs=1e-6)
    assert test.score > 0.3
