"""One run in several processes: the same losses and weights as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from small_data import SETTINGS, write_letters

from deltaworks.core.errors import UserError
from deltaworks.store.records import Record, read_record
from deltaworks.train import search
from deltaworks.train.devices import Team, join
from deltaworks.train.fitting import fit
from deltaworks.train.loop import train
from deltaworks.train.recipe import Recipe, parse_recipe
from deltaworks.train.stage import prepare

HERE = Path(__file__).parent


def words(folder: Path) -> str:
    """Rows whose targets have 1 to 17 letters: the shares of a batch count unequal numbers of tokens."""
    path = folder / "words.jsonl"
    rows = [{"prompt": "ab"[k % 2] * (k % 5 + 1), "target": "abcd"[k % 4] * (k * k % 17 + 1)} for k in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    monkeypatch.chdir(HERE)
    common = {**SETTINGS, "steps": 8, "curve_points": 4, "ranks": False, "forgetting": "none", "batch_size": 7}
    letters = {**common, "data": str(write_letters(tmp_path))}
    tokens = {**common, "data": words(tmp_path), "model": "tiny_decoders:causal"}
    return {
        "classes": {**letters, "method": "lora[rank=2]", "rates": [1e-2, 1e-3]},
        "budget": {**letters, "method": "adalora[rank=2]"},
        "pruned": {**letters, "method": "lora[rank=2]+light-peft[estimate=4]"},
        "resting": {**letters, "method": "lora[rank=2]+ist"},
        "tokens": {**tokens, "method": "lora[rank=2]"},
        "targets": {**tokens, "model": "tiny_decoders:seq2seq", "task": "seq2seq", "method": "ia3"},
        "few": {**tokens, "method": "lora[rank=2]", "batch_size": 2, "limit": 13},  # last batches of one example
    }


def test_alone_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = join("cpu")
    loss = torch.tensor(2.0)
    assert team == Team()
    assert team.weighted(loss, [{}], len) is loss
    assert team.of_main(lambda: 3) == team.sum(3)
    assert (team.main, team.words) == (True, "")


@pytest.mark.parametrize("name", ["classes", "tokens", "targets", "few"])
def test_the_shares_of_a_batch_add_up_to_its_loss_and_gradients(recipes: dict[str, Any], name: str) -> None:
    stage = prepare(parse_recipe(recipes[name]))
    delta = stage.attach()
    for examples in list(stage.batches())[5:8]:
        whole = stage.loss(stage.model, stage.task.collate(examples))
        gradients = torch.autograd.grad(whole, delta.parameters())
        parts = []
        for rank in range(3):
            team = Team(rank, 3)
            loss = stage.loss(stage.model, stage.task.collate(team.share(examples)))
            parts.append(team.weighted(loss, examples, stage.task.counted))
        assert float(torch.stack(parts).sum().detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
        assert len({float(part.detach()) for part in parts}) == (3 if len(examples) > 2 else len(examples) + 1)
        sums = torch.autograd.grad(torch.stack(parts).sum(), delta.parameters())
        for one, other in zip(gradients, sums, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_share_that_counts_nothing_weighs_nothing() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    nothing = torch.nn.functional.cross_entropy(logits, torch.tensor([-100, -100]))
    assert nothing.isnan()
    weighted = Team(1, 2).weighted(nothing, [{"tokens": 4}, {"tokens": 0}], lambda rows: sum(r["tokens"] for r in rows))
    weighted.backward()
    assert weighted.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("size", "device", "sentence"), [("2", "cuda:1", "device=cuda:1 is one device, and 2 processes were started")]
)
def test_a_device_that_cannot_be_shared(size: str, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=sentence):
        join(device)


def test_a_batch_that_is_too_small_to_share(recipes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="batch_size=7 leaves some of 8 processes nothing"):
        prepare(parse_recipe(recipes["classes"]), team=Team(0, 8))


def launched(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(
        command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(recipes: dict[str, Any], tmp_path: Path) -> None:
    """Losses, scores and weights, for classes and tokens, with methods that decide by gradients or losses."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"recipes": recipes, "out": str(tmp_path)}))
    done = launched([__file__, str(plan)])
    assert done.returncode == 0, done.stderr[-3000:]
    for name, recipe in recipes.items():
        alone, values = trained(parse_recipe(recipe), Team())
        records = [read_record(tmp_path / f"{name}-{rank}.json") for rank in (0, 1)]
        assert records[0].test == records[1].test
        assert records[0].hardware.endswith("one of 2 processes")
        shared = records[0]
        assert shared.run_id == alone.run_id
        assert (shared.learning_rate, shared.examples) == (alone.learning_rate, alone.examples)
        for one, two in zip(alone.curve, shared.curve, strict=True):
            assert two.loss == pytest.approx(one.loss, rel=1e-4), name
            assert two.validation == pytest.approx(one.validation, abs=0.05), name
        main, other = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert main.keys() == other.keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(main[key], other[key]), f"{name}: {key} differs between the processes"
            # Adam turns the rounding of a gradient near zero into a step of any size up to the rate
            torch.testing.assert_close(main[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_tune_in_two_processes_prints_and_saves_once(recipes: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipes["classes"]))
    done = launched(["-m", "deltaworks", "tune", str(recipe), f"out={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy") == 1
    record = read_record(tmp_path / "out" / "record.json")
    assert record.status == "finished"
    small = launched(["-m", "deltaworks", "tune", str(recipe), f"out={tmp_path / 'small'}", "batch_size=1"])
    assert small.returncode != 0
    assert "batch_size=1 leaves some of 2 processes nothing" in small.stderr


def trained(recipe: Recipe, team: Team) -> tuple[Record, dict[str, torch.Tensor]]:
    """The record of a run and the values that its last trial trained."""
    kept: dict[str, torch.Tensor] = {}

    def watched(stage: Any, delta: Any, *rest: Any) -> None:
        fit(stage, delta, *rest)
        kept.clear()
        kept.update((name, value.detach().clone()) for name, value in delta.named_parameters())

    with mock.patch.object(search, "fit", watched):
        return train(recipe, team=team), kept


@pytest.mark.slow
def test_a_method_that_decides_by_its_own_share_is_refused(recipes: dict[str, Any], tmp_path: Path) -> None:
    """ID3 opens entries by the gradients of the backward pass, before they are summed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**recipes["classes"], "method": "id3[keep=0.05]"}))
    done = launched(["-m", "deltaworks", "tune", str(recipe), f"out={tmp_path / 'out'}"])
    assert done.returncode != 0
    assert "id3[keep=0.05] decides by what each process sees for itself: train it in one process" in done.stderr


def main(plan: str) -> None:
    """In each of the processes: every recipe trained, its record and its trained values kept."""
    content = json.loads(Path(plan).read_text())
    team = join("cpu")
    for name, values in content["recipes"].items():
        record, kept = trained(parse_recipe(values), team)
        out = Path(content["out"]) / f"{name}-{team.rank}"
        out.with_suffix(".json").write_text(record.model_dump_json())
        torch.save(kept, out.with_suffix(".pt"))


if __name__ == "__main__":
    main(sys.argv[1])
