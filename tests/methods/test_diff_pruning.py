"""Diff pruning: the gates by numbers, the cut by hand, the second stage, resuming and what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.selective.concrete import SATURATED, gate, uniform
from deltaworks.methods.selective.diff_pruning import DiffProcedure
from deltaworks.store.checkpoint import resume


def diff(model: nn.Module, **options: Any) -> tuple[dw.Delta, DiffProcedure]:
    delta = dw.attach(model, "diff-pruning", **{"keep": 0.05, **options})
    assert isinstance(delta.procedure, DiffProcedure)
    return delta, delta.procedure


def train(model: nn.Module, inputs: Any, delta: dw.Delta, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        delta.procedure.loss(zoo.loss_of("bert", model, inputs)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()


def started(seed: int = 0, steps: int = 8, rate: float = 1e-3) -> tuple[nn.Module, Any, dw.Delta, Any]:
    """BERT in training mode, its adapter and the optimizer, all begun."""
    model, inputs = zoo.ZOO["bert"]()
    model.train()
    delta = dw.attach(model, "diff-pruning", keep=0.05, seed=seed)
    begin(delta, "bert", inputs, steps=steps)
    optimizer = torch.optim.AdamW(delta.parameter_groups(rate, weight_decay=0.1))
    delta.procedure.optimizing(optimizer)
    return model, inputs, delta, optimizer


def test_gates_are_zero_or_one_often() -> None:
    """At a = 0: P(z = 0) = 1/2 and P(z = 1) = 1/6; P(z = 0) = sigmoid(-a)."""
    noise = uniform(400_000, salt=5, draw=torch.tensor(3))
    z = gate(torch.zeros(()), noise)
    assert float(z.min()) == 0.0
    assert float(z.max()) == 1.0
    assert float((z == 0).float().mean()) == pytest.approx(1 / 2, rel=0.01)
    assert float((z == 1).float().mean()) == pytest.approx(1 / 6, rel=0.01)
    assert float((gate(torch.tensor(1.0), noise) == 0).float().mean()) == pytest.approx(0.26894, rel=0.01)
    assert gate(torch.tensor([-9.0, 0.0, 0.5, 9.0])).tolist() == pytest.approx([0, 0, 3 * 0.6224593 - 1.5, 1])
    for logits in (torch.tensor(SATURATED), torch.tensor(-SATURATED)):
        logits.requires_grad_(True)
        z = gate(logits, noise)
        assert set(z.tolist()) == {float(logits > 0)}
        assert torch.autograd.grad(z.sum(), logits)[0] == 0


def test_noise_is_uniform_and_another_one_each_time() -> None:
    draws = torch.stack([uniform(20_000, salt, torch.tensor(draw)) for salt in (0, 1) for draw in range(4)])
    assert torch.equal(draws[2], uniform(20_000, 0, torch.tensor(2)))
    assert float(draws.min()) > 0.0
    assert float(draws.max()) < 1.0
    counts = torch.stack([torch.histc(draw, 10, 0, 1) for draw in draws])
    assert float(((counts - 2000).square() / 2000).sum(1).max()) < 30  # chi-square of 9 degrees: p = 0.0004
    correlations = draws.corrcoef() - torch.eye(8)
    assert float(correlations.abs().max()) < 0.03
    beside = torch.stack([draws[0, :-1], draws[0, 1:], draws[0].roll(64)[:-1]]).corrcoef() - torch.eye(3)
    assert float(beside.abs().max()) < 0.03


def test_expected_count_and_its_gradient() -> None:
    """d/da sigmoid(a) = 1/4 at a = 0 for each entry; with a group the product of both."""
    model, _ = zoo.ZOO["bert"]()
    delta, procedure = diff(model, structured=False, penalty=1.0)
    tuner, name = procedure.each()[0]
    with torch.no_grad():
        tuner.logits[name].zero_()
    expected = tuner.expected(name)
    size = tuner.logits[name].numel()
    assert expected.item() == pytest.approx(size / 2)
    (gradient,) = torch.autograd.grad(expected, [tuner.logits[name]])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.25))
    delta.detach()
    _, procedure = diff(model, penalty=1.0)
    procedure.turn = 5
    tuner, name = procedure.each()[0]
    with torch.no_grad():
        tuner.logits[name].zero_()
        tuner.groups[name].zero_()
    assert tuner.expected(name).item() == pytest.approx(size / 4)
    total = sum(t.expected(n).item() for t, n in procedure.each())
    assert procedure.loss(torch.ones(())).item() == pytest.approx(1 + total)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.score(x))


def test_cut_by_hand() -> None:
    """Of (0.3, -0.5, 0.1, 0) the two largest stay."""
    model = Layer()
    base = model.score.weight.detach().clone()
    delta, procedure = diff(model, keep=0.5, structured=False)
    (tuner,) = procedure.tuners()
    with torch.no_grad():
        tuner.changes["weight"].copy_(torch.tensor([[0.3, -0.5, 0.1, 0.0]]))
    procedure.cut()
    torch.testing.assert_close(tuner.change("weight").detach(), torch.tensor([[0.3, -0.5, 0.0, 0.0]]))
    assert gate(tuner.logits["weight"]).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert delta.tensors()["score.chosen.weight.index"].tolist() == [0, 1]
    delta.merge(keep_base=False)
    assert torch.equal(model.score.weight[0, 2:], base[0, 2:])
    torch.testing.assert_close(model.score.weight[0, :2], base[0, :2] + torch.tensor([0.3, -0.5]))


def test_starts_as_the_base_in_training_too() -> None:
    model, inputs, _, _ = started()
    output = zoo.output_of("bert", model, inputs)
    plain, _ = zoo.ZOO["bert"]()
    assert torch.equal(output, zoo.output_of("bert", plain, inputs))


def test_two_stages() -> None:
    model, inputs, delta, optimizer = started()
    before = {key: value.clone() for key, value in model.named_parameters() if ".deltas." not in key}
    procedure = delta.procedure
    assert isinstance(procedure, DiffProcedure)
    train(model, inputs, delta, optimizer, 3)
    assert procedure.details()["diff_pruning_kept"] > 10 * procedure.count
    assert not torch.equal(
        *(torch.stack([t.change(n, True).norm() for t, n in procedure.each()]) for _ in drawn(procedure))
    )
    train(model, inputs, delta, optimizer, 1)
    masks = {key: index.clone() for key, index in delta.tensors().items() if key.endswith("index")}
    assert procedure.details()["diff_pruning_kept"] == procedure.count == sum(map(len, masks.values()))
    assert len(optimizer.state) == 0
    values = {key: value.clone() for key, value in delta.tensors().items() if key.endswith("values")}
    train(model, inputs, delta, optimizer, 4)
    after = delta.tensors()
    assert all(torch.equal(after[key], index) for key, index in masks.items())
    moved = sum(int((after[key] != value).sum()) for key, value in values.items())
    assert moved > 0.5 * procedure.count
    model.eval()
    delta.merge(keep_base=False)
    changed = sum(int((value != before[key]).sum()) for key, value in model.named_parameters())
    assert 0.95 * procedure.count < changed <= procedure.count


def drawn(procedure: DiffProcedure) -> Any:
    for draw in (1, 2):
        for tuner in procedure.tuners():
            tuner.draw.fill_(draw)
        yield draw


@pytest.mark.parametrize("at", [2, 6])
def test_resumed_in_the_middle(at: int, tmp_path: Path) -> None:
    results: list[list[Tensor]] = []
    for interrupted in (False, True):
        model, inputs, delta, optimizer = started()
        train(model, inputs, delta, optimizer, at)
        if interrupted:
            delta.save(tmp_path, training=True)
            state = optimizer.state_dict()
            model, inputs, delta, optimizer = started()
            resume(delta, tmp_path)
            optimizer.load_state_dict(state)
        train(model, inputs, delta, optimizer, 8 - at)
        results.append([parameter.detach() for parameter in delta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stored_entries_rebuild_the_weights(tmp_path: Path) -> None:
    model, inputs, delta, optimizer = started()
    train(model, inputs, delta, optimizer, 8)
    model.eval()
    expected, count = zoo.output_of("bert", model, inputs), delta.procedure.details()["diff_pruning_kept"]
    assert sum(t.numel() * t.element_size() for t in delta.tensors().values()) <= 8 * count
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    loaded = dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), expected)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == count
    begin(loaded, "bert", inputs)
    assert loaded.procedure.loss(torch.ones(())).item() == 1.0
    loaded.procedure.end()
    assert loaded.procedure.details()["diff_pruning_kept"] == count


def test_tied_weights_have_one_change_and_are_stored_once(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["gpt2"]()
    delta, procedure = diff(model)
    own = [name for name, _ in delta.named_parameters() if "wte" in name or "lm_head" in name]
    assert len(own) == 3  # the change, its gates and its group's
    begin(delta, "gpt2", inputs)
    with torch.no_grad():
        for parameter in (p for n, p in delta.named_parameters() if "changes" in n):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    procedure.cut()
    assert not any("lm_head" in key for key in delta.tensors())
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["gpt2"]()
    loaded = dw.load(fresh, tmp_path)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == procedure.count
    torch.testing.assert_close(zoo.output_of("gpt2", fresh, inputs), zoo.output_of("gpt2", model, inputs))


def test_published_count() -> None:
    """BERT-large: 2 N gates and changes and one for each of 391 tensors in training, k = 1.67M afterwards."""
    delta, procedure = diff(zoo.real("bert-large"), keep=0.005)
    assert procedure.count == 1_675_709
    assert sum(parameter.numel() for parameter in delta.parameters()) == 2 * 335_141_888 + 391
