"""One training run: its choice of rate, its measures, and what happens when it diverges."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_data import SETTINGS, write_letters
from torch import nn

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.store.records import Record
from deltaworks.train import fitting, measure
from deltaworks.train.examine import examine
from deltaworks.train.fitting import Attempt, fit, parameter_groups, rate_factor
from deltaworks.train.loop import train
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.search import choose, search
from deltaworks.train.stage import Stage, prepare


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(Path(__file__).parent)
    return {**SETTINGS, "data": str(write_letters(tmp_path))}


def run(letters: dict[str, Any], **changes: Any) -> Record:
    return train(parse_recipe({**letters, **changes}))


def test_a_run_learns_and_records_everything(letters: dict[str, Any], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    recipe = parse_recipe({**letters, "method": "lora[rank=2]", "steps": 40})
    record = train(recipe, adapter=tmp_path / "adapter", tell=events.append)
    assert record.status == "finished"
    assert record.test is not None
    assert record.test.score is not None
    assert record.test.score > 0.7
    assert record.test.correct is not None
    assert len(record.test.correct) == record.data.sizes["test"] == 32
    assert record.test.score == pytest.approx(record.test.correct.count("1") / 32)
    assert record.curve[-1].loss is not None
    assert record.curve[0].loss is not None
    assert record.curve[-1].loss < record.curve[0].loss
    assert [point.step for point in record.curve] == [20, 40]
    assert record.counts.trainable == sum(2 * (n + m) for n, m in [(32, 32)] * 8 + [(32, 64), (64, 32)] * 2)
    assert record.examples == 3 * 102 + 8  # 13 batches in an epoch, the last one smaller
    assert record.merge_error is not None
    assert record.merge_error < 1e-4
    assert record.rank["attention.q"].max == 2
    assert record.counts.stored_bytes == measure.folder_bytes(tmp_path / "adapter")
    for value in (record.training_samples_per_second, record.inference_samples_per_second, record.wall_seconds):
        assert value is not None
        assert value > 0
    assert record.training_tokens_per_second == pytest.approx(12 * record.training_samples_per_second)
    assert events[0]["event"] == "prepared"
    assert events[-1]["event"] == "test"
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 41))


def test_the_same_seed_gives_the_same_run_and_another_another(letters: dict[str, Any]) -> None:
    first, again, other = (run(letters, method="lora[rank=2]", seed=seed) for seed in (0, 0, 1))
    assert [point.loss for point in first.curve] == [point.loss for point in again.curve]
    assert first.test == again.test
    assert [point.loss for point in first.curve] != [point.loss for point in other.curve]
    assert first.run_id == again.run_id != other.run_id


def test_the_rate_is_chosen_on_validation_and_its_adapter_is_tested(letters: dict[str, Any], tmp_path: Path) -> None:
    rates = [1e-6, 1e-2, 1e6]
    record = train(parse_recipe({**letters, "rates": rates, "steps": 40}), adapter=tmp_path / "best")
    assert [trial.rate for trial in record.learning_rates] == rates
    assert record.learning_rates[2].score is None
    assert record.learning_rate == 1e-2
    assert record.learning_rate_split == "validation"
    alone = train(parse_recipe({**letters, "rates": [1e-2], "steps": 40}), adapter=tmp_path / "alone")
    assert record.test == alone.test
    names = [next((tmp_path / folder).glob("*.safetensors")).name for folder in ("best", "alone")]
    assert names[0] == names[1]  # named by their content


def test_several_rates_need_validation_rows(letters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="several rates"):
        run(letters, rates=[1e-3, 1e-2], validation=0)
    assert run(letters, steps=2, validation=0).learning_rate_split == ""


def test_ties_go_to_the_smaller_rate_and_divergence_never_wins() -> None:
    attempts = [Attempt(1, score=0.5), Attempt(2, score=0.5), Attempt(3, diverged="nan"), Attempt(4)]
    assert choose(attempts).rate == 1
    assert choose(attempts[2:]).rate == 4


@pytest.mark.parametrize("method", ["lora[rank=2]", "full", "head"])
def test_a_run_that_diverges_is_a_record(letters: dict[str, Any], method: str, tmp_path: Path) -> None:
    record = train(parse_recipe({**letters, "method": method, "rates": [1e6]}), adapter=tmp_path / "adapter")
    assert record.status == "diverged"
    assert "learning rate 1e+06" in record.message
    assert record.test is None
    assert not (tmp_path / "adapter").exists()


def test_a_fresh_head_is_trained_with_its_own_rate(letters: dict[str, Any]) -> None:
    stage = prepare(parse_recipe({**letters, "method": "lora[rank=2]", "head_rate": 0.5}))
    stage.loaded.head = ["classifier"]
    delta = stage.attach()
    rates = {id(p): group["lr"] for group in parameter_groups(stage, delta, 1e-3) for p in group["params"]}
    for name, parameter in delta.named_parameters():
        assert rates.pop(id(parameter)) == (0.5 if name.startswith("classifier") else 1e-3), name
    assert not rates
    delta.detach()
    alone = prepare(parse_recipe({**letters, "method": "head", "head_rate": 0.5}))
    alone.loaded.head = ["classifier"]
    delta = alone.attach()
    assert [group["lr"] for group in parameter_groups(alone, delta, 1e-3)] == [1e-3]


@pytest.mark.parametrize("method", ["full", "head", "lora[rank=2]"])
def test_the_head_is_counted_once_and_apart(letters: dict[str, Any], method: str) -> None:
    stage = prepare(parse_recipe({**letters, "method": method}))
    stage.loaded.head = ["classifier"]
    record = run_stage(stage)
    head = 32 * 4 + 4
    assert record["counts"].head == head
    sizes = {"head": 0, "full": sum(p.numel() for p in stage.model.parameters()) - head}
    if method in sizes:
        assert record["counts"].trainable == sizes[method]


def run_stage(stage: Stage) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        search(stage, Path(folder) / "adapter", lambda event: None)
        return examine(stage, Path(folder) / "adapter", lambda event: None)


def test_the_base_is_as_it_was_after_a_run(letters: dict[str, Any]) -> None:
    stage = prepare(parse_recipe({**letters, "method": "lora[rank=2]"}))
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    run_stage(stage)
    after = stage.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("changes", [{"bfloat16": True}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_lean_arithmetic_trains_too(letters: dict[str, Any], changes: dict[str, Any]) -> None:
    record = run(letters, method="lora[rank=2]", steps=30, **changes)
    assert record.status == "finished"
    assert record.curve[-1].loss is not None
    assert record.curve[0].loss is not None
    assert record.curve[-1].loss < record.curve[0].loss


def test_checkpointing_saves_activations(letters: dict[str, Any]) -> None:
    whole = run(letters, method="lora[rank=2]", steps=3)
    lean = run(letters, method="lora[rank=2]", steps=3, gradient_checkpointing=True)
    assert whole.saved_activation_bytes is not None
    assert lean.saved_activation_bytes is not None
    assert lean.saved_activation_bytes < 0.5 * whole.saved_activation_bytes
    assert lean.peak_memory_bytes is not None
    assert whole.peak_memory_bytes is not None
    assert lean.peak_memory_bytes < whole.peak_memory_bytes


def test_rates_rise_then_fall() -> None:
    factor = rate_factor(100, 0.06, "linear")
    assert [round(factor(step), 3) for step in (0, 2, 5)] == [0.167, 0.5, 1.0]
    assert factor(6) == pytest.approx(1.0)
    assert factor(53) == pytest.approx(0.5)
    assert 0 < factor(99) < 0.02
    assert rate_factor(1, 0.0, "linear")(0) == 1.0


def test_memory_of_a_step_is_what_its_tensors_take() -> None:
    """One linear layer [64, 64] on a batch of 8, squared: input and output are saved, gradients come and go."""
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(8, 64)
    found = measure.step_memory(layer, lambda: layer(x).square().sum())
    gradient, output = 64 * 64 * 4, 8 * 64 * 4
    assert found.saved == 2 * output
    assert gradient + output <= found.peak <= gradient + 4 * output
    assert layer.weight.grad is None
    assert measure.model_bytes(layer) == 64 * 64 * 4
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    assert measure.optimizer_bytes(optimizer) == 2 * 64 * 64 * 4 + 4


def test_merge_error_is_none_where_nothing_can_be_merged() -> None:
    from zoo import ZOO

    for method, merges in (("lora[rank=2]", True), ("houlsby", False)):
        model, inputs = ZOO["bert"]()
        delta = dw.attach(model, method)
        error = measure.merge_error(delta, lambda model=model, inputs=inputs: model(**inputs).logits)
        assert (error is not None) == merges
        if error is not None:
            assert error < 1e-4
        assert not delta.merged


def test_a_matrix_that_cannot_be_decomposed_is_a_divergence(letters: dict[str, Any]) -> None:
    stage = prepare(parse_recipe({**letters, "method": "lora[rank=2]"}))
    delta = stage.attach()

    def stepped() -> None:
        torch.linalg.svd(torch.full((2, 2), torch.nan))

    delta.procedure.stepped = stepped  # type: ignore[method-assign]
    attempt = Attempt(1e-3)
    fit(stage, delta, attempt, lambda event: None)
    assert attempt.diverged.startswith("linalg.svd")
    assert attempt.diverged.endswith("(learning rate 0.001)")
    assert not attempt.complete


def test_throughput_is_all_tokens_over_all_time_without_the_first_steps_and_the_scoring(
    letters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step k takes k seconds by a clock of its own, a score on the way 1000, and texts have 1 to 9 tokens."""
    rows = [{"text": "abcd"[k % 4] * (k % 9 + 1), "label": "abcd"[k % 4]} for k in range(120)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = prepare(parse_recipe({**letters, "data": str(tmp_path / "uneven.jsonl"), "steps": 6, "curve_points": 6}))
    delta, attempt, clock = stage.attach(), Attempt(1e-2), SimpleNamespace(now=0.0, step=0)
    evaluate = stage.evaluate

    def stepped() -> None:
        clock.step += 1
        clock.now += clock.step

    def scored(encoded: Any) -> dict[str, Any]:
        clock.now += 1000
        return evaluate(encoded)

    delta.procedure.stepped = stepped  # type: ignore[method-assign]
    monkeypatch.setattr(stage, "evaluate", scored)
    monkeypatch.setattr(fitting, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    fit(stage, delta, attempt, lambda event: None)
    timed = list(stage.batches())[fitting.WARMING_STEPS :]
    assert attempt.timed_seconds == 3 + 4 + 5 + 6
    assert attempt.timed_samples == sum(map(len, timed)) == 4 * 8
    assert attempt.timed_tokens == sum(len(row["input_ids"]) for batch in timed for row in batch)
    assert attempt.timed_tokens != 5 * attempt.timed_samples


def test_a_trial_that_fails_leaves_no_gradients(letters: dict[str, Any]) -> None:
    stage = prepare(parse_recipe({**letters, "method": "lora[rank=2]"}))
    delta = stage.attach()
    attempt = Attempt(1e6)
    fit(stage, delta, attempt, lambda event: None)
    assert attempt.diverged
    assert all(parameter.grad is None for parameter in delta.parameters())
    assert not stage.model.training
