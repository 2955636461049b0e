"""SAM: gains by hand and by enumeration, counts per tensor, signed sums, what never moves."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.selective.entries import largest
from deltaworks.methods.selective.sam import SAMProcedure, gain


def sam(model: nn.Module, **options: Any) -> tuple[dw.Delta, SAMProcedure]:
    delta = dw.attach(model, "sam", **options)
    assert isinstance(delta.procedure, SAMProcedure)
    return delta, delta.procedure


def test_gain_by_hand() -> None:
    """g^2 / h = (10, 1, 4): entry 1 of 3 is best; with a constant h entry 2 is."""
    gradient, curvature = torch.tensor([1.0, 3.0, -2.0]), torch.tensor([0.1, 9.0, 1.0])
    torch.testing.assert_close(2 * gain(gradient, curvature), torch.tensor([10.0, 1.0, 4.0]))
    assert largest(gain(gradient, curvature), 1).tolist() == [0]
    assert largest(gain(gradient), 1).tolist() == [1]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_mask_has_a_lower_loss_on_a_diagonal_quadratic(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(6, generator=generator)
    curvature = torch.rand(6, generator=generator) + 0.1

    def lowest(mask: tuple[int, ...]) -> float:
        """g d + h d^2 / 2 at its minimum d = -g / h over the entries of the mask."""
        step = torch.zeros(6)
        step[list(mask)] = (-gradient / curvature)[list(mask)]
        return float(gradient @ step + (curvature * step.square()).sum() / 2)

    masks = list(combinations(range(6), 2))
    assert len(masks) == 15
    best = min(masks, key=lowest)
    assert tuple(largest(gain(gradient, curvature), 2).tolist()) == best
    assert lowest(best) == pytest.approx(-float(gain(gradient, curvature)[list(best)].sum()))


class Product(nn.Module):
    """w x before a head that passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(2, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.score(x))


def test_opposite_gradients_cancel() -> None:
    """The loss is w x, so the gradients are x: (5, 1) and (-5, 1). Squares would choose the first entry."""
    batches = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-5.0, 1.0]])]
    delta, procedure = sam(Product(), keep=0.5)
    procedure.begin(dw.Run(steps=1, batches=batches, loss=lambda model, x: model(x).sum()))
    assert delta.tensors()["score.chosen.weight.index"].tolist() == [1]
    squares = dw.attach(Product(), "fish", keep=0.5)
    squares.procedure.begin(dw.Run(steps=1, one_by_one=batches, loss=lambda model, x: model(x).sum()))
    assert squares.tensors()["score.chosen.weight.index"].tolist() == [0]
    assert procedure.details() == {
        "sam_kept": 1,
        "sam_entries": {"score.weight": 1},
        "sam_batches": 2,
    }


def test_burn_in_changes_nothing_and_is_as_long_as_asked() -> None:
    model, inputs = zoo.ZOO["bert"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    delta, procedure = sam(model, burn_in=3)
    batches = [inputs] * 5
    procedure.begin(dw.Run(10, batches, lambda model, batch: zoo.loss_of("bert", model, batch)))
    assert procedure.burned == 3
    delta.detach()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["bert", "t5", "convnet"])
def test_each_tensor_keeps_its_floor_and_the_rest_never_moves(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    delta, procedure = sam(model, keep=0.02)
    begin(delta, name, inputs)
    owners, shared = procedure.owners(), procedure.tuners()[0].entries
    positions = {}
    for key, parameter in procedure.parameters().items():
        assert shared[key].values.numel() == max(1, int(0.02 * parameter.numel()))
        item, tensor = owners[key]
        positions[f"{item.key}.{tensor}"] = set(shared[key].index.tolist())
    names = {id(parameter): key for key, parameter in model.named_parameters()}  # a tied one's first name
    positions = {names[id(model.get_parameter(key))]: index for key, index in positions.items()}
    expected = sum(parameter.numel() for parameter in delta.parameters())
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3, weight_decay=0.1))
    for _ in range(10):
        optimizer.zero_grad()
        delta.procedure.loss(zoo.loss_of(name, model, inputs)).backward()
        optimizer.step()
    delta.merge(keep_base=False)
    after, moved = dict(model.named_parameters()), 0
    for key, value in before.items():
        changed = set((after[key] != value).flatten().nonzero().flatten().tolist())
        assert changed <= positions.get(key, set()), key
        moved += len(changed)
    assert 0.8 * expected < moved <= expected


def test_within_the_model_all_entries_compete() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, procedure = sam(model, keep=0.02, compete="model")
    begin(delta, "bert", inputs)
    trained = sum(parameter.numel() for parameter in delta.parameters())
    assert trained == procedure.count == int(0.02 * (22_500 - 132))
    densities = {round(e.values.numel() / n, 3) for t in delta.tuners() for e, n in sizes(t)}
    assert len(densities) > 5


def sizes(tuner: Any) -> list[tuple[Any, int]]:
    return [(entries, tuner.own[name][1]) for name, entries in tuner.chosen.items()]


def test_stored_and_restored_with_its_mask(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, _ = sam(model, keep=0.02)
    begin(delta, "bert", inputs)
    saved = {key: value.clone() for key, value in delta.tensors().items()}
    delta.save(tmp_path, training=True)
    fresh, _ = zoo.ZOO["bert"]()
    loaded = dw.load(fresh, tmp_path)
    begin(loaded, "bert", {**inputs, "labels": 3 - inputs["labels"]})  # the mask that was loaded stays
    assert loaded.tensors().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.tensors().items())


def test_composed_with_another_method() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "sam[keep=0.02]+lora")
    begin(delta, "bert", inputs)
    assert delta.procedure.details()["sam_kept"] > 0


def test_without_batches_is_an_error() -> None:
    model, _ = zoo.ZOO["bert"]()
    _, procedure = sam(model)
    with pytest.raises(dw.UserError, match="before the first step"):
        procedure.loss(torch.zeros(()))
    with pytest.raises(dw.UserError, match="batches"):
        procedure.begin(dw.Run(steps=1))
    with pytest.raises(dw.UserError, match="yields none"):
        procedure.begin(dw.Run(steps=1, loss=lambda model, x: model(x).sum()))


def test_published_count() -> None:
    """About 0.43M of the 85M of RoBERTa-base's encoder: per layer 4 x 2,949 + 2 x 11,796 + 4 x 3 + 15 + ... entries."""
    _, procedure = sam(zoo.real("roberta-base"), targets=["linear", "norm.attention", "norm.mlp"])
    parameters = procedure.parameters().values()
    assert sum(parameter.numel() for parameter in parameters) == 85_054_464
    layer = 4 * 2_949 + 2 * 11_796 + 9 * 3 + 15  # matrices; biases and norms of 768; the bias of 3,072
    assert sum(procedure.share(parameter.numel()) for parameter in parameters) == 12 * layer == 425_160
