"""The Hugging Face Trainer with an adapter: hooks, groups, checkpoints of the adapter alone, exact resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from zoo import CLASSES, ZOO

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.core.registry import find, registry

EXAMPLES, STEPS = 24, 6


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 64, (EXAMPLES, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones(10), "labels": row[0] % CLASSES} for row in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(**{**fixed, **options})


def trainer_of(folder: Path, method: str, callbacks: list[Any] | None = None, **options: Any) -> dw.DeltaTrainer:
    model, _ = ZOO["bert"]()
    for module in model.modules():  # dropout, so that the random state matters
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    delta = dw.attach(model, method, also=["head"], seed=3)
    data = examples()
    return dw.DeltaTrainer(
        delta, arguments(folder, **options), train_dataset=data, eval_dataset=data[:8], callbacks=callbacks or []
    )


def values_of(trainer: dw.DeltaTrainer) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in trainer.delta.tensors(training=True).items()}


class StopAt(TrainerCallback):
    """Ends a run in the middle, as an interruption does after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


ADALORA = "adalora[rank=2, interval=1]"


@pytest.mark.parametrize(
    "method", ["lora[rank=2, dropout=0.1]", "lora[rank=2, ratio=4]+bitfit", ADALORA, "fish[keep=0.05]", "ia3"]
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, method: str) -> None:
    whole = trainer_of(tmp_path / "whole", method, save_strategy="steps", save_steps=3)
    whole.train()
    part = trainer_of(tmp_path / "part", method, [StopAt(3)], save_strategy="steps", save_steps=3)
    part.train()
    rest = trainer_of(tmp_path / "part", method, save_strategy="steps", save_steps=3)
    started = values_of(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    expected, found = values_of(whole), values_of(rest)
    assert found.keys() == expected.keys()
    assert any(key not in started or not torch.equal(started[key], found[key]) for key in found)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)
    assert rest.state.global_step == whole.state.global_step == STEPS
    state, other = whole.delta.procedure.state(), rest.delta.procedure.state()
    assert str(state) == str(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry()))
def test_every_method_resumes_exactly(tmp_path: Path, name: str) -> None:
    method = str(find(name)(**find(name).small))
    test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path, method)


def test_checkpoints_hold_the_adapter_alone_for_us_and_for_peft(tmp_path: Path) -> None:
    import peft

    trainer = trainer_of(tmp_path, "lora[rank=2]", save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    names = {path.name.split("-")[0] for path in folder.iterdir()}
    own, theirs = {"adapter.json", "adapter"}, {"adapter_config.json", "adapter_model.safetensors"}
    assert names == own | theirs | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    trained = sum(parameter.numel() for parameter in trainer.delta.parameters())
    stored = next(folder.glob("adapter-*.safetensors")).stat().st_size
    assert 4 * trained <= stored <= 4 * trained + 6000
    model, inputs = ZOO["bert"]()
    loaded = dw.load(model, folder)
    assert loaded.config == trainer.delta.config
    foreign = peft.PeftModel.from_pretrained(ZOO["bert"]()[0], str(folder)).eval()
    trainer.model.eval()
    inputs.pop("labels", None)
    with torch.no_grad():
        expected = trainer.model(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)
        torch.testing.assert_close(foreign(**inputs).logits, expected)


def test_what_peft_cannot_hold_is_saved_in_our_format_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "houlsby[reduction=4]", max_steps=1)
    trainer.save_model(str(tmp_path / "final"))
    assert {path.name.split("-")[0] for path in (tmp_path / "final").iterdir()} == {"adapter.json", "adapter"}


def test_save_model_writes_an_adapter_that_loads(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "lora[rank=2]")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model, inputs = ZOO["bert"]()
    dw.load(model, tmp_path / "final")
    trainer.model.eval()
    inputs.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, trainer.model(**inputs).logits)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, "lora[rank=2]", learning_rate=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses)  # at this rate the last step is not the best one
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_only_the_last_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, "lora[rank=2]", learning_rate=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint)).name
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")}
    assert left == {best, f"checkpoint-{STEPS}"}
    assert best != f"checkpoint-{STEPS}"


def test_labels_are_smoothed_as_without_an_adapter(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "lora[rank=2]", label_smoothing_factor=0.3, max_steps=1)
    plain, _ = ZOO["bert"]()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        for model in (plain, trainer.model):
            model.eval()
        logits = plain(**{key: value for key, value in batch.items() if key != "labels"}).logits
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
        assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same(tmp_path: Path, reentrant: bool) -> None:
    plain = trainer_of(tmp_path / "plain", "lora[rank=2]")
    plain.train()
    lean = trainer_of(
        tmp_path / "lean", "lora[rank=2]", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    lean.train()
    expected = values_of(plain)
    for key, value in values_of(lean).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "precision"),
    [("lora[rank=2]", "bf16"), ("adalora[rank=2, interval=1]", "bf16"), ("adalora[rank=2, interval=1]", "fp16")],
)
def test_mixed_precision_keeps_float32_masters_and_learns(tmp_path: Path, method: str, precision: str) -> None:
    trainer = trainer_of(tmp_path, method, max_steps=30, **{precision: True})
    trainer.train()
    assert {parameter.dtype for parameter in trainer.delta.parameters()} == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_trains_float32_masters(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = ZOO["bert"]()
    delta = dw.attach(model.to(dtype), "lora[rank=2]", also=["head"], seed=3)
    trainer = dw.DeltaTrainer(delta, arguments(tmp_path, max_steps=20), train_dataset=examples())
    trainer.train()
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_groups_follow_the_method(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "lora[rank=2, ratio=16]")
    optimizer = trainer.create_optimizer()
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {1e-2, 16e-2}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.delta.parameters()}
    assert len(held) == len({id(p) for p in held})


class Counting(dw.Procedure):
    """Notes what it is called with; its term of the loss is a constant 2."""

    def __init__(self, delta: dw.Delta) -> None:
        super().__init__(delta)
        self.calls: list[str] = []

    def begin(self, run: dw.Run) -> None:
        assert run.steps == STEPS
        assert run.loss is not None
        assert run.one_by_one is not None
        batch = next(iter(run.batches))
        assert batch["input_ids"].shape[0] == 4
        assert next(iter(run.one_by_one))["input_ids"].shape[0] == 1
        assert run.loss(self.delta.model, batch).shape == ()
        self.calls.append("begin")

    def loss(self, loss: Tensor) -> Tensor:
        return loss + 2

    def gradients(self) -> None:
        assert all(parameter.grad is not None for parameter in self.delta.parameters())
        self.calls.append("gradients")

    def stepped(self) -> None:
        assert all(parameter.grad is not None for parameter in self.delta.parameters())
        self.calls.append("stepped")

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_procedure_hears_every_moment(tmp_path: Path, accumulation: int) -> None:
    plain = trainer_of(tmp_path / "plain", "lora[rank=2]", gradient_accumulation_steps=accumulation)
    plain.train()
    trainer = trainer_of(tmp_path / "told", "lora[rank=2]", gradient_accumulation_steps=accumulation)
    procedure = Counting(trainer.delta)
    trainer.delta.procedure = procedure
    trainer.train()
    assert procedure.calls == ["begin", *["gradients", "stepped"] * STEPS, "end"]
    expected = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # a constant term changes no gradient, and is counted once however many batches are accumulated
    assert found == pytest.approx([loss + 2 for loss in expected], abs=1e-3)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "one", "lora[rank=2]", save_strategy="steps", save_steps=6)
    trainer.train()
    other = trainer_of(tmp_path / "other", "lora[rank=3]")
    with pytest.raises(UserError, match="is a checkpoint of 'lora"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(UserError, match="finished adapter"):
        trainer_of(tmp_path / "third", "lora[rank=2]").train(resume_from_checkpoint=str(tmp_path / "final"))


def test_only_an_adapter_that_acts_is_trained(tmp_path: Path) -> None:
    model, _ = ZOO["bert"]()
    with pytest.raises(dw.UserError, match=r"was given a BertForSequenceClassification: .* dw\.attach\(\) returns"):
        dw.DeltaTrainer(model, arguments(tmp_path))  # type: ignore[arg-type]
    first = dw.attach(model, "lora", name="first")
    first.merge()
    with pytest.raises(dw.UserError, match=r"'first' is merged, .*: unmerge\(\) it first"):
        dw.DeltaTrainer(first, arguments(tmp_path))
    first.unmerge()
    second = dw.attach(model, "lora", name="second")
    with pytest.raises(dw.UserError, match=r"'first' is resting, .*: dw\.switch\(model, 'first'\) first"):
        dw.DeltaTrainer(first, arguments(tmp_path))
    second.detach()
    with pytest.raises(dw.UserError, match=r"'second' is detached, .*: attach it first"):
        dw.DeltaTrainer(second, arguments(tmp_path))
