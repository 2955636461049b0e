"""SNELLA: SNELL as its special case, budgets, shares and averages by hand, rounds over a run, resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import begin, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.kernel.competition import CompetitionProcedure, allocated, smoothed
from deltaworks.methods.reparametrized.kernel.snell import distances
from deltaworks.methods.reparametrized.kernel.snella import SNELLATuner
from deltaworks.store.checkpoint import resume


def snella(model: nn.Module, **options: Any) -> tuple[dw.Delta, CompetitionProcedure]:
    delta = dw.attach(model, "snella", **{"rank": 4, **options})
    assert isinstance(delta.procedure, CompetitionProcedure)
    return delta, delta.procedure


def layers(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for width in widths))


def test_without_its_kernel_it_is_snell() -> None:
    outputs = []
    for method, options in (("snell", {"sparsity": 0.5}), ("snella", {"initial": 0.5})):
        model, inputs = zoo.ZOO["vit"]()
        delta = dw.attach(model, method, rank=4, **options)
        with torch.no_grad():
            for name, parameter in delta.named_parameters():
                if name.endswith((".A", ".B")):
                    seed = len(name) + parameter.shape[1]
                    parameter.normal_(generator=torch.Generator().manual_seed(seed))
                else:
                    parameter.zero_()  # alpha and beta are 0; so is the logarithm of gamma
        outputs.append(zoo.output_of("vit", model, inputs).detach())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_without_sparsity_the_kernel_is_the_change() -> None:
    """At the start alpha softmax(D) adds 1 to each input's column, and nothing is squared."""
    delta, _ = snella(nn.Sequential(nn.Linear(5, 7)), targets="0", sparsity=0.0)
    (tuner,) = delta.tuners()
    assert isinstance(tuner, SNELLATuner)
    change, D = tuner.change(*tuner.inputs()).detach(), distances(tuner.A, tuner.B, 0.1).detach()
    torch.testing.assert_close(change.sum(0), 1 + D.sum(0))


def test_softmax_runs_over_the_outputs_of_each_input() -> None:
    delta, _ = snella(nn.Sequential(nn.Linear(5, 7)), targets="0", rule="soft")
    (tuner,) = delta.tuners()
    assert isinstance(tuner, SNELLATuner)
    zero = torch.zeros(())
    with torch.no_grad():
        A, B, alpha, gamma, beta = tuner.inputs()
        plain = tuner.change(A, B, zero, gamma, zero)
        tuner.rule = "squared"
        squared = tuner.change(A, B, zero, gamma, zero)
        mixed = tuner.change(A, B, alpha, gamma, beta)
    assert plain.shape == mixed.shape == (7, 5)
    kernel, whole = squared.sign() * squared.abs().sqrt(), mixed.sign() * mixed.abs().sqrt()
    torch.testing.assert_close((whole - kernel).sum(0), torch.ones(5), rtol=1e-3, atol=1e-3)


def test_budget_by_hand() -> None:
    """1000 entries, s from 0 to 0.8, T = 10: 1000 at first, 200 + 800 / 8 in round 5, 200 in the last one."""
    delta, procedure = snella(layers(20, 20, 10, 10), targets="?", sparsity=0.8, rounds=10)
    procedure.begin(dw.Run(steps=10))
    assert sum(tuner.size for tuner in procedure.tuners.values()) == 1000
    assert [procedure.budget(turn) for turn in (0, 5, 9)] == [1000, 300, 200]
    delta.detach()
    _, procedure = snella(layers(20, 20, 10, 10), targets="?", sparsity=0.8, rounds=10, warmup=0.2, final=0.3)
    procedure.begin(dw.Run(steps=10))
    assert [procedure.budget(turn) for turn in (0, 2, 7, 9)] == [1000, 1000, 200, 200]
    assert procedure.budget(4) == int(200 + 800 * 0.6**3)
    with pytest.raises(dw.UserError, match="take all"):
        snella(layers(20), targets="?", warmup=0.5, final=0.5)[1].begin(dw.Run(steps=10))


def test_allocation_by_hand() -> None:
    """(100, 12) of 120 by score, and the 8 that are left go where there is room."""
    assert allocated([0.9, 0.1], [100, 100], 120) == [100, 20]
    assert allocated([1.0, 1.0], [100, 100], 120) == [60, 60]
    assert allocated([0.0, 0.0, 0.0], [10, 10, 40], 30) == [10, 10, 10]
    assert allocated([0.0, 0.0], [10, 10], 1_000) == [10, 10]
    assert allocated([1.0, 0.0], [100, 1_000_000], 900_100) == [100, 900_000]
    assert allocated([0.5, 0.3, 0.2], [7, 5, 3], 8) == [5, 2, 1]


def test_averages_by_hand() -> None:
    average, uncertainty, constant = torch.zeros(1), torch.zeros(1), torch.ones(1)
    smoothed(average, uncertainty, constant, 0.85)
    assert (average.item(), uncertainty.item()) == pytest.approx((0.15, 0.1275))
    smoothed(average, uncertainty, constant, 0.85)
    assert (average.item(), uncertainty.item()) == pytest.approx((0.2775, 0.21675))


def run(steps: int, *, stop: int | None = None, path: Path | None = None) -> tuple[dw.Delta, CompetitionProcedure]:
    """Train ViT; at ``stop`` save it, and go on with a fresh model that is resumed."""
    model, inputs = zoo.ZOO["vit"]()
    delta, procedure = snella(model, rounds=5)
    begin(delta, "vit", inputs, steps=steps)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3))
    for step in range(steps):
        if step == stop:
            assert path is not None
            delta.save(path, training=True)
            kept = optimizer.state_dict()
            model, inputs = zoo.ZOO["vit"]()
            delta, procedure = snella(model, rounds=5)
            resume(delta, path)
            begin(delta, "vit", inputs, steps=steps)
            optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3))
            optimizer.load_state_dict(kept)
        procedure.loss(zoo.loss_of("vit", model, inputs)).backward()
        procedure.gradients()
        optimizer.step()
        procedure.stepped()
        optimizer.zero_grad()
    return delta, procedure


def test_the_budget_moves_between_layers_and_is_all_used() -> None:
    delta, procedure = run(10)
    told = procedure.details()["snella_entries"]
    assert told["steps"] == [2, 4, 6, 8]
    assert list(told["values"]) == list(procedure.tuners)
    for row, turn in zip(zip(*told["values"].values(), strict=True), range(1, 5), strict=True):
        assert sum(row) == procedure.budget(turn)
    assert len({entries[-1] for entries in told["values"].values()}) > 3
    for key, tuner in procedure.tuners.items():
        changed = int((tuner.change(*tuner.inputs()) != 0).sum())
        assert abs(changed - told["values"][key][-1]) <= 1
    total = sum(row.changed for row in delta.report().rows)
    assert total == pytest.approx(procedure.budget(4), abs=len(procedure.tuners))


def test_resumed_in_the_middle(tmp_path: Path) -> None:
    whole, expected = run(10)
    resumed, procedure = run(10, stop=5, path=tmp_path)
    assert procedure.details() == expected.details()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(expected.scores[name], score) for name, score in procedure.scores.items())


def test_saved_with_its_entries(tmp_path: Path) -> None:
    delta, procedure = run(4)
    disturb(delta)
    inputs = zoo.ZOO["vit"]()[1]
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["vit"]()
    loaded = dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("vit", fresh, inputs), zoo.output_of("vit", delta.model, inputs))
    assert isinstance(loaded.procedure, CompetitionProcedure)
    assert {key: [tuner.kept] for key, tuner in loaded.procedure.tuners.items()} == {
        key: entries[-1:] for key, entries in procedure.history.values.items()
    }
    key = next(key for key in delta.tensors() if key.endswith("entries"))
    with pytest.raises(dw.UserError, match="whole number up to"):
        loaded.restore(delta.tensors() | {key: torch.tensor([10**9])})


def test_adapters_with_other_entries_do_not_share_a_graph() -> None:
    model, _ = zoo.ZOO["vit"]()
    snella(model)
    other = dw.attach(model, "snella", rank=4, name="two")
    path = other.attached[0].place.path
    assert model.get_submodule(path)._alike
    other.tuners()[0].allow(3)  # type: ignore[operator]
    other.reshaped()
    assert not model.get_submodule(path)._alike


def test_merged_equals_unmerged_and_gradients_reach_all() -> None:
    model, inputs = zoo.ZOO["vit"]()
    delta, _ = snella(model, initial=0.5)
    disturb(delta)
    zoo.loss_of("vit", model, inputs).backward()
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(p.grad is not None and bool(p.grad.any()) for p in delta.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    before: Tensor = zoo.output_of("vit", model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("vit", model, inputs), before, rtol=1e-5, atol=1e-5)


def test_published_count() -> None:
    """r (in + out) + 3 for each of 72 layers: 5,308,632."""
    with torch.device("meta"):
        model = hf.ViTModel(hf.ViTConfig())
    delta = dw.attach(model, "snella", targets="attention,mlp")
    assert len(delta.attached) == 72
    assert delta.report().trainable == 5_308_632
    assert sum(tuner.size for tuner in delta.tuners()) == 84_934_656  # type: ignore[misc]
