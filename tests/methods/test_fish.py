"""FISH Mask: the Fisher information by hand, exactly k entries, what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import begin, disturb, one_by_one
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.calibration import squared_gradients
from deltaworks.methods.selective.entries import largest
from deltaworks.methods.selective.fish import FishProcedure


class Logistic(nn.Module):
    """p = sigmoid(w x) before a head that passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(2, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.score(x))


EXAMPLES = [(torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)), (torch.tensor([[0.0, 3.0]]), torch.ones(1, 1))]


def logistic_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def information(model: nn.Module, loss: Any, examples: list[Any]) -> Tensor:
    delta = dw.attach(model, "fish", keep=0.5)
    procedure = delta.procedure
    assert isinstance(procedure, FishProcedure)
    run = dw.Run(steps=1, loss=loss, one_by_one=examples)
    scores, _ = squared_gradients(model, list(procedure.parameters().values()), run, samples=1024)
    delta.detach()
    return torch.cat([score.flatten() for score in scores])


def test_information_by_hand() -> None:
    """p = 1/2, so the gradients are (0.5, 0) and (0, 1.5): F = (0.125, 1.125) and the first to keep is w2."""
    scores = information(Logistic(), logistic_loss, EXAMPLES)
    torch.testing.assert_close(scores, torch.tensor([0.125, 1.125]))
    delta = dw.attach(model := Logistic(), "fish", keep=0.5)
    delta.procedure.begin(dw.Run(steps=1, loss=logistic_loss, one_by_one=EXAMPLES))
    with torch.no_grad():
        delta.parameters()[0].fill_(7.0)
    delta.merge()
    assert model.score.weight.tolist() == [[0.0, 7.0]]
    assert delta.procedure.details() == {"fish_kept": 1, "fish_entries": {"score.weight": 1}, "fish_samples": 2}


def test_order_of_the_examples_does_not_matter_but_their_number_in_a_batch_does() -> None:
    model, inputs = zoo.ZOO["bert"]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return zoo.loss_of("bert", model, batch)

    singles = one_by_one(inputs)
    forward, backward = (information(model, loss, order) for order in (singles, singles[::-1]))
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-9)
    assert set(largest(forward, 200).tolist()) == set(largest(backward, 200).tolist())
    together = information(model, loss, [inputs])
    assert float((together - forward).abs().max()) > 0.1 * float(forward.max())


def test_exactly_k_with_ties_by_position() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert largest(scores, 3).tolist() == [1, 2, 3]
    assert largest(torch.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert largest(scores, 6).tolist() == list(range(6))
    with pytest.raises(dw.UserError, match="raise keep"):
        largest(scores, 0)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_the_rest_never_moves_and_the_state_is_small(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    head = {"bert": 132}.get(name, 0)  # the others' head is tied to the embedding, and counted once there
    expected = int(0.02 * (sum(value.numel() for value in before.values()) - head))
    delta = dw.attach(model, "fish", keep=0.02)
    begin(delta, name, inputs)
    assert sum(parameter.numel() for parameter in delta.parameters()) == expected
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3, weight_decay=0.01))
    for _ in range(10):
        optimizer.zero_grad()
        delta.procedure.loss(zoo.loss_of(name, model, inputs)).backward()
        optimizer.step()
    state = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    assert sum(value.numel() for value in state) == 2 * expected
    tensors = delta.tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 8.2 * expected
    delta.merge(keep_base=False)
    after = dict(model.named_parameters())
    moved = sum(int((after[key] != value).sum()) for key, value in before.items())
    assert 0.9 * expected < moved <= expected


def test_all_of_it_is_full_fine_tuning() -> None:
    outputs = []
    for method, options in (("fish", {"keep": 1.0}), ("full", {"targets": "embedding,norm,linear,pooler"})):
        model, inputs = zoo.ZOO["bert"]()
        delta = dw.attach(model, method, **options)
        begin(delta, "bert", inputs)
        optimizer = torch.optim.SGD(delta.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            zoo.loss_of("bert", model, inputs).backward()
            optimizer.step()
        assert sum(parameter.numel() for parameter in delta.parameters()) == 22_500 - 132
        outputs.append(zoo.output_of("bert", model, inputs))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_stored_and_restored_exactly(name: str, training: bool, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "fish", keep=0.02)
    begin(delta, name, inputs)
    disturb(delta)
    delta.save(tmp_path, training=training)
    fresh, _ = zoo.ZOO[name]()
    loaded = dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of(name, fresh, inputs), zoo.output_of(name, model, inputs))
    chosen = {key: value.clone() for key, value in loaded.tensors().items()}
    begin(loaded, name, inputs)  # the mask that was loaded stays
    assert all(torch.equal(loaded.tensors()[key], value) for key, value in chosen.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: index + 10**6, "positions between 0 and"),
        (lambda index: index - 10**6, "positions between 0 and"),
        (lambda index: index.flip(0), "ascending"),
        (lambda index: index.float(), "ascending"),
        (lambda index: index[:-1], "two lists of one length"),
    ],
)
def test_bad_positions_are_refused(spoil: Any, message: str) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "fish", keep=0.02)
    begin(delta, "bert", inputs)
    tensors = delta.tensors()
    key = max((key for key in tensors if key.endswith("index")), key=lambda key: tensors[key].numel())
    fresh, _ = zoo.ZOO["bert"]()
    with pytest.raises(dw.UserError, match=message):
        dw.attach(fresh, "fish").restore(tensors | {key: spoil(tensors[key])})
    with pytest.raises(dw.UserError, match="pairs of 'index' and 'values'"):
        dw.attach(fresh, "fish", name="two").restore({k: v for k, v in tensors.items() if k != key})


def test_training_without_the_pass_is_an_error() -> None:
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "fish")
    with pytest.raises(dw.UserError, match="before the first step"):
        delta.procedure.loss(torch.zeros(()))
    with pytest.raises(dw.UserError, match="one_by_one"):
        delta.procedure.begin(dw.Run(steps=1))
    with pytest.raises(dw.UserError, match="yields none"):
        delta.procedure.begin(dw.Run(steps=1, loss=logistic_loss, one_by_one=[]))


def test_the_pass_leaves_the_model_as_it_was() -> None:
    model, inputs = zoo.ZOO["bert"]()
    model.train()
    model.bert.pooler.eval()
    delta = dw.attach(model, "fish", samples=2, also=["head"])
    seen: list[bool] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model.training)
        return zoo.loss_of("bert", model, batch)

    delta.procedure.begin(dw.Run(steps=1, loss=loss, one_by_one=one_by_one(inputs)))
    assert seen == [False, False]
    assert model.training
    assert not model.bert.pooler.training
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "keep", "expected"),
    [("bert-large", 0.005, 1_675_709), ("t5-3b", 0.002, 5_703_196), ("t5-large", 0.005, 3_688_340)],
)
def test_published_counts(name: str, keep: float, expected: int) -> None:
    """floor(keep N), tied weights once: 1.68M of BERT-large, about 6M of 3B."""
    procedure = dw.attach(zoo.real(name), "fish", keep=keep).procedure
    assert isinstance(procedure, FishProcedure)
    assert procedure.count == expected
