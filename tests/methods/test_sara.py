"""SaRA: the mask by hand, the nuclear norm by hand, what rests after the turn, resuming and what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.selective.sara import SaRAProcedure, SmallEntries, default_rate, nuclear_norm
from deltaworks.store.checkpoint import resume


def sara(model: nn.Module, **options: Any) -> tuple[dw.Delta, SaRAProcedure]:
    delta = dw.attach(model, "sara", **{"threshold": 0.05, "above": 8, **options})
    assert isinstance(delta.procedure, SaRAProcedure)
    return delta, delta.procedure


def train(name: str, model: nn.Module, inputs: Any, delta: dw.Delta, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        delta.procedure.loss(zoo.loss_of(name, model, inputs)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()


def test_mask_by_hand() -> None:
    """Strictly below the threshold, by absolute value: [[1, 0], [1, 0]] of [[.001, -.003], [0, .0021]] at 2e-3."""
    P0 = torch.tensor([[0.001, -0.003], [0.0, 0.0021]])
    assert SmallEntries(P0, 2e-3).index.tolist() == [0, 2]
    assert SmallEntries(torch.tensor([0.5, -0.5, 0.25]), 0.5).index.tolist() == [2]


def test_nuclear_norm_by_hand() -> None:
    """The subgradient of diag(3, -2) is diag(1, -1); entries outside the mask get none."""
    P = torch.tensor([[3.0, 9.0], [9.0, -2.0]])
    entries = SmallEntries(P, 5.0)
    assert entries.index.tolist() == [0, 3]
    norm = nuclear_norm(P, entries)
    assert norm.item() == pytest.approx(5.0)
    norm.backward()
    torch.testing.assert_close(entries.values.grad, torch.tensor([1.0, -1.0]))


def test_rate_of_a_threshold() -> None:
    assert default_rate(2e-3) == pytest.approx(4.966e-4, abs=1e-7)
    assert default_rate(1e-2) == pytest.approx(3.0e-5, abs=5e-7)
    assert dw.registry()["sara"].learning_rate == default_rate(2e-3)
    config = dw.registry()["sara"](threshold=8e-4)
    assert config.learning_rate == pytest.approx(7.56e-4, abs=1e-6)
    assert config == dw.registry()["sara"](threshold=8e-4)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_starts_as_the_base_and_counts_what_is_small(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    base = zoo.output_of(name, model, inputs).detach()
    skipped = "classifier"  # an untied head
    small = sum(int((p.abs() < 0.05).sum()) for key, p in model.named_parameters() if not key.startswith(skipped))
    delta, procedure = sara(model)
    torch.testing.assert_close(zoo.output_of(name, model, inputs), base, rtol=1e-6, atol=1e-6)
    for item in delta.attached:
        for key, parameter in model.get_submodule(item.place.path)._parameters.items():
            assert parameter is None or torch.equal(item.tuner.tensor(key, parameter), parameter)
    assert sum(parameter.numel() for parameter in delta.parameters()) == small == procedure.details()["sara_kept"]
    assert small > 1000


def test_gradient_is_the_dense_one_at_the_mask_and_none_stays_on_the_base() -> None:
    plain, inputs = zoo.ZOO["bert"]()
    zoo.loss_of("bert", plain, inputs).backward()
    model, _ = zoo.ZOO["bert"]()
    delta, procedure = sara(model)
    zoo.loss_of("bert", model, inputs).backward()
    assert len(procedure.pairs) > 20
    for name, (key, entries) in procedure.pairs.items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(entries.values.grad, dense.flatten()[entries.index], rtol=1e-5, atol=1e-6)
        assert procedure.parameters()[key].grad is None
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


def test_the_mask_narrows_once_and_the_rest_rests() -> None:
    model, inputs = zoo.ZOO["bert"]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    delta, procedure = sara(model)
    begin(delta, "bert", inputs, steps=10)
    optimizer = torch.optim.AdamW(delta.parameter_groups(2e-2, weight_decay=0.1))
    procedure.optimizing(optimizer)
    train("bert", model, inputs, delta, optimizer, 4)
    assert not procedure.live
    train("bert", model, inputs, delta, optimizer, 1)
    assert procedure.turn == procedure.step == 5
    assert all(entries.values not in optimizer.state for _, entries in procedure.pairs.values())
    turned = {name: entries.values.detach().clone() for name, (_, entries) in procedure.pairs.items()}
    train("bert", model, inputs, delta, optimizer, 5)
    resting = moved = 0
    for name, (key, entries) in procedure.pairs.items():
        live, index = procedure.live[name], entries.index
        torch.testing.assert_close(live, (procedure.values(key).flatten()[index] + turned[name]).abs() < 0.05)
        assert torch.equal(entries.values[~live], turned[name][~live])
        assert float(optimizer.state[entries.values]["step"]) == 5
        resting += int((turned[name][~live] != 0).sum())
        moved += int((entries.values != turned[name])[live].sum())
    assert resting > 300
    assert moved > 300
    assert procedure.details()["sara_live_entries"] == {name: int(live.sum()) for name, live in procedure.live.items()}
    allowed = {name: set(entries.index.tolist()) for name, (_, entries) in procedure.pairs.items()}
    delta.merge(keep_base=False)
    for key, value in model.named_parameters():
        changed = (value != before[key]).flatten().nonzero().flatten().tolist()
        assert set(changed) <= allowed.get(key, set()), key


def test_the_norm_is_of_one_matrix_a_step_and_makes_it_smaller() -> None:
    model, _ = zoo.ZOO["bert"]()
    delta, procedure = sara(model, nuclear=1.0)
    drawn = []
    for step in range(12):
        procedure.step = step
        penalty = procedure.loss(torch.zeros(()))
        pairs = {name: procedure.pairs[name] for name in procedure.eligible}
        norms = {name: nuclear_norm(procedure.values(key), own).item() for name, (key, own) in pairs.items()}
        drawn += [name for name, norm in norms.items() if norm == pytest.approx(penalty.item(), rel=1e-6)]
        assert penalty.item() == procedure.loss(torch.zeros(())).item()
    assert len(drawn) == 12
    assert len(set(drawn)) > 5
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.01)
    procedure.loss(torch.zeros(())).backward()
    optimizer.step()
    assert procedure.loss(torch.zeros(())).item() < penalty.item()
    assert "bert.embeddings.LayerNorm.weight" not in procedure.eligible
    assert sara(zoo.ZOO["bert"]()[0], above=64)[1].eligible == []


@pytest.mark.parametrize("at", [3, 7])
def test_resumed_in_the_middle(at: int, tmp_path: Path) -> None:
    results: list[list[Tensor]] = []
    for interrupted in (False, True):
        model, inputs = zoo.ZOO["bert"]()
        delta, procedure = sara(model)
        begin(delta, "bert", inputs, steps=10)
        optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
        procedure.optimizing(optimizer)
        train("bert", model, inputs, delta, optimizer, at)
        if interrupted:
            delta.save(tmp_path, training=True)
            state = optimizer.state_dict()
            model, _ = zoo.ZOO["bert"]()
            delta, procedure = sara(model)
            resume(delta, tmp_path)
            begin(delta, "bert", inputs, steps=10)
            optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
            optimizer.load_state_dict(state)
            procedure.optimizing(optimizer)
        train("bert", model, inputs, delta, optimizer, 10 - at)
        results.append([parameter.detach() for parameter in delta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stored_values_alone_and_rebuilt_exactly(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, _ = sara(model)
    disturb(delta)
    expected, tensors = zoo.output_of("bert", model, inputs), delta.tensors()
    trained = sum(parameter.numel() for parameter in delta.parameters())
    values = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert sum(value.numel() for value in values) == trained
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 4 * trained + 8 * len(values)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), expected)
    other, _ = zoo.ZOO["bert"]()
    with pytest.raises(dw.UserError, match="other entries than those"):
        sara(other, threshold=0.04)[0].restore(tensors)
    shifted, _ = zoo.ZOO["bert"]()
    key = "bert.encoder.layer.0.attention.self.query.chosen.weight.mark"
    with pytest.raises(dw.UserError, match="other entries than those"):
        sara(shifted)[0].restore(tensors | {key: tensors[key] + 1})
