"""BA-LoRA: the three losses by hand, the teacher, the schedule, exact resumption, counts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.output_losses import consistency, covariance, negative_entropy, spectrum
from deltaworks.store.checkpoint import resume


def begun(family: str, spec: str = "ba-lora[rank=4]", steps: int = 100) -> tuple[nn.Module, dict[str, Any], dw.Delta]:
    model, inputs = zoo.ZOO[family]()
    delta = dw.attach(model, spec)
    delta.procedure.begin(dw.Run(steps=steps))
    return model, inputs, delta


def step_to(procedure: Any, step: int) -> None:
    procedure.step = step


# ---------------------------------------------------------------------------- the losses


def test_consistency_by_hand() -> None:
    """Teacher (2, 0), student (0, 0), T = 2: 0.44378; the mean over rows; nothing for equal logits."""
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    assert float(consistency(student, teacher, 2.0)) == pytest.approx(0.44378, abs=1e-5)
    assert float(consistency(student.expand(3, 2), teacher.expand(3, 2), 2.0)) == pytest.approx(0.44378, abs=1e-5)
    assert float(consistency(teacher, teacher, 2.0)) == 0
    assert float(consistency(teacher + 5, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(consistency(teacher, student, 2.0)) != pytest.approx(0.44378, abs=1e-3)  # the teacher comes first


def test_covariance_by_hand() -> None:
    """Z = [[1, 1], [-1, -1]]: Cov = [[2, 2], [2, 2]], so (4 + 4) / 2 = 4; a single row has none."""
    assert float(covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))) == 4
    assert float(covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == 0
    assert float(covariance(torch.tensor([[1.0, 2.0]]))) == 0


def test_spectrum_by_hand() -> None:
    """Z = diag(3, 1), k = 1: -3 / 4 and -3 / sqrt(10)."""
    Z = torch.diag(torch.tensor([3.0, 1.0]))
    assert float(spectrum(Z, 1, frobenius=False)) == pytest.approx(-0.75)
    assert float(spectrum(Z, 1, frobenius=True)) == pytest.approx(-0.9487, abs=1e-4)
    assert float(spectrum(Z[:1], 1, frobenius=True)) == 0
    assert float(spectrum(torch.zeros(3, 4), 2, frobenius=True)) == 0


def test_the_sketched_spectrum_is_near_the_exact_one_and_pulls_the_same_way() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([9.0, 7, 5, 3, 2, 1, 1, 0.5, 0.5, 0.5, 0.2, 0.2])
    left, right = torch.linalg.qr(torch.randn(40, 12))[0], torch.linalg.qr(torch.randn(5000, 12))[0]
    Z = (left * sizes @ right.T).requires_grad_()
    found = spectrum(Z, 3, frobenius=True)
    exact = -torch.linalg.svdvals(Z)[:3].sum() / Z.norm()
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    mine, theirs = (torch.autograd.grad(value, Z)[0] for value in (found, exact))
    assert float(F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)) > 0.999


def test_entropy_of_the_likeliest() -> None:
    """Uniform over the top K: -log K; the other words and a constant change nothing."""
    logits = torch.cat([torch.full((2, 20), 3.0), torch.full((2, 30), -4.0)], dim=1)
    assert float(negative_entropy(logits, 20)) == pytest.approx(-math.log(20), abs=1e-6)
    noisy = torch.randn(4, 50)
    assert float(negative_entropy(noisy + 7, 20)) == pytest.approx(float(negative_entropy(noisy, 20)), abs=1e-5)
    assert float(negative_entropy(torch.zeros(1, 5), 20)) == pytest.approx(-math.log(5), abs=1e-6)


# ---------------------------------------------------------------------------- the procedure


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "vit"])
def test_the_teacher_is_the_pretrained_model(family: str) -> None:
    base, inputs = zoo.ZOO[family]()
    expected = zoo.output_of(family, base, inputs).detach()
    model, inputs, delta = begun(family)
    procedure: Any = delta.procedure
    loss = zoo.loss_of(family, model, inputs)
    procedure.loss(loss)
    assert procedure.history.values["consistency"][0] == pytest.approx(0, abs=1e-6)  # CR at step 0
    disturb(delta)
    model.train()
    loss = zoo.loss_of(family, model, inputs)
    arguments, keywords, output = procedure.call.value
    teacher = procedure.teacher(arguments, keywords, output)
    torch.testing.assert_close(teacher, procedure.chosen(keywords, expected), rtol=1e-4, atol=1e-4)
    assert not teacher.requires_grad
    assert (procedure.chosen(keywords, output) - teacher).abs().max() > 0.01
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("family", "words", "shifted"), [("llama", True, True), ("t5", True, False), ("bert", False, False)]
)
def test_rows_that_count(family: str, words: bool, shifted: bool) -> None:
    """Words: positions with a label, shifted for a causal model; classes: every example."""
    model, inputs, delta = begun(family)
    procedure: Any = delta.procedure
    assert (procedure.words, procedure.shifted) == (words, shifted)
    output, labels = model(**inputs), inputs["labels"]
    rows = procedure.chosen(inputs, output)
    if not words:
        assert torch.equal(rows, output.logits)
        return
    valid = labels[:, 1:] != -100 if shifted else labels != -100
    assert len(rows) == int(valid.sum())
    torch.testing.assert_close(F.cross_entropy(rows, (labels[:, 1:] if shifted else labels)[valid]), output.loss)


def test_padding_changes_nothing() -> None:
    model, inputs, delta = begun("llama")
    disturb(delta)
    procedure: Any = delta.procedure
    padded = {key: F.pad(value, (0, 4), value=-100 if key == "labels" else 0) for key, value in inputs.items()}
    step_to(procedure, 50)
    losses = [float(procedure.loss(model(**batch).loss).detach()) for batch in (inputs, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_terms_are_added_with_their_weights() -> None:
    model, inputs, delta = begun(
        "bert", "ba-lora[rank=4,consistency=2,diversity=3,spectral=5,leading=2,temperature=1.5]"
    )
    disturb(delta)
    base, _ = zoo.ZOO["bert"]()
    teacher, output = base(**inputs).logits, model(**inputs)
    Z = output.logits
    expected = output.loss + 2 * consistency(Z, teacher, 1.5) + 3 * covariance(Z) + 5 * spectrum(Z, 2, frobenius=False)
    found = delta.procedure.loss(output.loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if id(p) not in {id(q) for q in delta.parameters()})


def test_schedule_on_words() -> None:
    """l1 falls to a tenth; at 10 % of the steps l2 = l3 = 0, between 20 and 25 % they rise, then they stay."""
    procedure: Any = begun("llama")[2].procedure
    assert procedure.weights(0) == pytest.approx((0.025, 0, 0))
    assert procedure.weights(0.1)[1:] == (0, 0)
    assert procedure.weights(0.225)[1:] == pytest.approx((0.0025, 0.0025))
    assert procedure.weights(0.25)[1:] == pytest.approx((0.005, 0.005))
    assert procedure.weights(0.5)[0] == pytest.approx(0.55 * 0.025)
    assert procedure.weights(1) == pytest.approx((0.0025, 0.005, 0.005))
    constant: Any = begun("llama", "ba-lora[rank=4,scheduled=false]")[2].procedure
    assert constant.weights(0) == constant.weights(1) == (0.025, 0.005, 0.005)
    classes: Any = begun("bert")[2].procedure
    assert classes.weights(0) == classes.weights(1) == (0.15, 0.03, 0.03)


def train(family: str, spec: str, steps: int = 4) -> list[Tensor]:
    model, inputs, delta = begun(family, spec, steps)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    for _ in range(steps):
        delta.procedure.loss(zoo.loss_of(family, model, inputs)).backward()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in delta.parameters()]


def test_without_weights_it_is_pissa() -> None:
    zero = "consistency=0,diversity=0,spectral=0"
    for mine, theirs in zip(
        train("bert", f"ba-lora[rank=4,{zero}]"), train("bert", "lora[rank=4,pissa=true]"), strict=True
    ):
        assert torch.equal(mine, theirs)
    pairs = zip(train("bert", "ba-lora[rank=4]"), train("bert", "lora[rank=4,pissa=true]"), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in pairs)


def test_refusals() -> None:
    delta = dw.attach(zoo.ZOO["bert"]()[0], "ba-lora[rank=4]")
    with pytest.raises(dw.UserError, match=r"call procedure.begin\(run\)"):
        delta.procedure.loss(torch.zeros(()))
    delta.procedure.begin(dw.Run(steps=5))
    with pytest.raises(dw.UserError, match="call the model before"):
        delta.procedure.loss(torch.zeros(()))
    with pytest.raises(dw.UserError, match="logits of classes or words"):
        dw.attach(zoo.ZOO["clip"]()[0], "ba-lora[rank=4]")
    with pytest.raises(dw.UserError, match="alpha must be above 0"):
        dw.attach(zoo.ZOO["bert"]()[0], "ba-lora[rank=4,alpha=0]")


def test_what_was_seen_is_let_go() -> None:
    """Logits are kept for the losses alone, and never in a pass without gradients."""
    model, inputs, delta = begun("llama")
    procedure: Any = delta.procedure
    loss = zoo.loss_of("llama", model, inputs)
    assert procedure.call.value is not None
    delta.procedure.loss(loss)
    assert procedure.call.value is None
    with torch.no_grad():
        model(**inputs)
    assert procedure.call.value is None
    delta.detach()
    zoo.loss_of("llama", model, inputs)
    assert procedure.call.value is None


def test_state_resumes_and_details_tell(tmp_path: Path) -> None:
    model, inputs, delta = begun("llama", steps=8)
    disturb(delta)
    procedure: Any = delta.procedure
    for _ in range(5):
        procedure.loss(zoo.loss_of("llama", model, inputs))
        procedure.stepped()
    delta.save(tmp_path, training=True)
    other = begun("llama", steps=8)[2]
    resume(other, tmp_path)
    assert other.procedure.state() == procedure.state()
    told = procedure.details()["ba_lora_loss"]
    assert told["steps"] == [0, 1, 2, 3, 4]
    consistency, diversity, spectral = told["values"].values()
    assert consistency[4] > 0
    assert diversity[4] < 0  # minus an entropy
    assert -(10**0.5) < spectral[4] < 0  # of at most ten singular values over the norm
    assert diversity[1] == 0  # not before a fifth of the steps


def trainer_of(folder: Path, halt: int | None = None) -> dw.DeltaTrainer:
    """BERT with dropout on a few random examples for six steps, a checkpoint after every second one."""
    model, _ = zoo.ZOO["bert"]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    tokens = torch.randint(3, 64, (24, 10), generator=torch.Generator().manual_seed(5))
    data: Any = [{"input_ids": row, "labels": row[0] % zoo.CLASSES} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        use_cpu=True,
    )
    trainer = dw.DeltaTrainer(dw.attach(model, "ba-lora[rank=4]", seed=3), arguments, train_dataset=data)
    if halt is not None:
        trainer.add_callback(HaltAt(halt))
    return trainer


class HaltAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_in_the_trainer_it_resumes_exactly(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    trainer_of(tmp_path / "parts", halt=4).train()
    rest = trainer_of(tmp_path / "parts")
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for mine, theirs in zip(rest.delta.parameters(), whole.delta.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    details = whole.delta.procedure.details()
    assert rest.delta.procedure.details() == details
    assert details["ba_lora_loss"]["steps"] == [0, 1, 2, 3, 4, 5]
    assert details["ba_lora_loss"]["values"]["consistency"][-1] > 0


# ---------------------------------------------------------------------------- the change


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merges_and_converts_into_a_lora_of_twice_the_rank(family: str) -> None:
    """Step 0 is the base; merged within 1e-5; B = [B, -B0], A = [A; A0] on the untouched base gives the same."""
    base, inputs = zoo.ZOO[family]()
    model, _, delta = begun(family)
    start, expected = zoo.output_of(family, model, inputs), zoo.output_of(family, base, inputs)
    torch.testing.assert_close(start, expected, rtol=1e-4, atol=1e-4)
    for item in delta.attached:
        tuner: Any = item.tuner
        module: Any = base.get_submodule(item.place.path)
        matrix = module.weight.detach() if family == "llama" else module.weight.detach().T
        rows = slice(*item.place.part) if item.place.part else slice(None)
        rest = torch.linalg.svdvals(matrix[rows] - tuner.B0 @ tuner.A0)[0]
        torch.testing.assert_close(rest, torch.linalg.svdvals(matrix[rows])[4], rtol=1e-4, atol=1e-5)
    disturb(delta)
    moved = zoo.output_of(family, model, inputs)
    twin, _ = zoo.ZOO[family]()
    lora = dw.attach(twin, "lora[rank=8,alpha=8]", targets="linear")
    for ours, theirs in zip(delta.attached, lora.attached, strict=True):
        A, B, scale = ours.tuner.factors()
        with torch.no_grad():
            theirs.tuner.A.copy_(A)  # type: ignore[operator, union-attr]
            theirs.tuner.B.copy_(scale * B)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(zoo.output_of(family, twin, inputs), moved, rtol=1e-4, atol=1e-4)
    delta.merge()
    scale = float(moved.detach().abs().max())
    torch.testing.assert_close(zoo.output_of(family, model, inputs), moved, rtol=1e-5, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        ("llama-7b", 128, 319_815_680),
        ("llama3-8b", 64, 167_772_160),  # Mistral-7B has the same blocks: 168 M
        ("deberta-v3-base", 8, 1_327_104),  # 1.33 M
    ],
)
def test_counts(name: str, rank: int, expected: int) -> None:
    assert dw.attach(zoo.real(name), "ba-lora", rank=rank).report().trainable == expected


def test_count_on_gemma_7b() -> None:
    """28 blocks of 3072 with heads of 16 * 256 and 24,576 hidden features, r = 64: 200.0 M."""
    config = transformers.LlamaConfig(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        head_dim=256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert dw.attach(model, "ba-lora[rank=64]").report().trainable == 200_015_872
