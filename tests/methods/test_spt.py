"""SPT: sensitivities by hand, the rule for matrices and vectors, budgets, gradients, merging and what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.calibration import gathered_gradients


def test_scores_by_hand() -> None:
    """L = (w x)^2 / 2 at w = (1, 2): x = (1, 1) gives (9, 9); the batches (1, 0) and (0, 1) give (1, 4)."""
    weight = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        weight.weight.copy_(torch.tensor([[1.0, 2.0]]))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum() / 2

    for batches, expected in (([[1.0, 1.0]], [9.0, 9.0]), ([[1.0, 0.0], [0.0, 1.0]], [1.0, 4.0])):
        inputs = [torch.tensor([x]) for x in batches]
        scores, seen = gathered_gradients(weight, [weight.weight], loss, inputs, Tensor.square)
        assert scores[0].tolist() == [expected]
        assert seen == len(batches)


class Wide(nn.Module):
    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.layer = nn.Linear(768, 768, device=device)
        self.norm = nn.LayerNorm(768, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def planner(**options: Any) -> Any:
    delta = dw.attach(Wide(), "spt", targets="layer,norm", **options)
    return getattr(delta.procedure, "members", [delta.procedure])[0]


def test_rule_for_matrices_and_vectors() -> None:
    """768 x 768 with LoRA r = 8 costs 12,288: a module from 1,229 entries on; a vector of 768 is whole from 154 on."""
    procedure = planner()
    assert procedure.plan([1228, 153, 0, 0]) == (["entries"] * 4, 1228 + 153)
    kinds, total = procedure.plan([1229, 154, 153, 154])
    assert kinds == ["module", "whole", "entries", "whole"]
    assert total == 12_288 + 768 + 153 + 768
    adapter = planner(module="adapter")
    cost = 2 * 8 * 768 + 8 + 768
    assert adapter.plan([-(-cost // 10) - 1, 0, 0, 0])[0][0] == "entries"
    assert adapter.plan([-(-cost // 10), 0, 0, 0]) == (["module", "entries", "entries", "entries"], cost)
    assert planner(part="entries").plan([10**5, 0, 0, 0])[0][0] == "entries"


def test_marked_entries_are_exactly_tau_also_with_ties() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    delta = dw.attach(model, "spt", targets="0,1", keep=8 / 35, part="entries", vector_ease=0.01)
    procedure: Any = delta.procedure
    procedure.allocate([torch.ones_like(parameter) for parameter in procedure.parameters().values()])
    assert procedure.details()["spt_kept"] == procedure.count == 8


@pytest.mark.parametrize("module", ["lora", "adapter"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_budget_is_met_the_rest_never_moves_and_it_reloads(name: str, module: str, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "spt", keep=0.05, rank=1, module=module, ease=4)
    base = zoo.output_of(name, model, inputs)
    begin(delta, name, inputs)
    torch.testing.assert_close(zoo.output_of(name, model, inputs), base, rtol=1e-6, atol=1e-6)
    procedure: Any = getattr(delta.procedure, "members", [delta.procedure])[0]
    details = delta.procedure.details()
    chosen = set(details["spt_module_values"])
    assert chosen, "some weight is sensitive enough"
    assert details["spt_kept"], "and some entries are left"
    for item in delta.attached:
        parameters = sum(parameter.numel() for parameter in item.tuner.parameters())
        if item.member == 1:
            assert parameters == (item.tuner.cost if item.place.path in chosen else 0)  # type: ignore[union-attr, operator]
        elif item.place.path in chosen:
            assert "weight" not in item.tuner.chosen  # type: ignore[union-attr, operator]
    trained = sum(parameter.numel() for parameter in delta.parameters())
    assert trained == details["spt_kept"] + sum(procedure.modules[path].cost for path in chosen)
    assert abs(trained - procedure.count) < 0.25 * procedure.count
    disturb(delta)
    expected = zoo.output_of(name, model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO[name]()
    loaded = dw.load(fresh, tmp_path)
    torch.testing.assert_close(zoo.output_of(name, fresh, inputs), expected, rtol=1e-6, atol=1e-6)
    names = [key for key, _ in loaded.named_parameters()]
    assert names == [key for key, _ in delta.named_parameters()]
    begin(loaded, name, inputs)  # what was loaded stays
    assert names == [key for key, _ in loaded.named_parameters()]
    if module == "adapter":
        assert delta.limit("merge")
        return
    delta.merge()
    torch.testing.assert_close(zoo.output_of(name, model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_gradients_of_entries_are_those_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(shape)
    delta = dw.attach(model, "spt", targets="0", keep=0.3, part="entries")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    delta.procedure.begin(dw.Run(steps=1, batches=[x], loss=loss))
    loss(model, x).backward()
    dense = nn.Linear(8, 4)
    dense.load_state_dict({key: model.state_dict()[f"0.{key}"] for key in ("weight", "bias")})
    loss(dense, x).backward()
    tuner: Any = delta.tuners()[0]
    for name, entries in tuner.chosen.items():
        gradient = getattr(dense, name).grad.flatten()[entries.index]
        torch.testing.assert_close(entries.values.grad, gradient, rtol=1e-5, atol=1e-6)


def test_what_it_needs_and_halves() -> None:
    delta = dw.attach(zoo.ZOO["bert"]()[0], "spt")
    with pytest.raises(dw.UserError, match="before the first step"):
        delta.procedure.loss(torch.zeros(()))
    with pytest.raises(dw.UserError, match="measures gradients"):
        delta.procedure.begin(dw.Run(steps=1))
    with pytest.raises(dw.UserError, match="one half of spt"):
        dw.attach(zoo.ZOO["bert"]()[0], "spt[part=modules]")
    both = dw.configure("spt[rank=2]+bitfit")
    assert [part.name for part in both.parts()] == ["spt", "spt", "bitfit"]


def test_published_costs() -> None:
    """ViT-B with r = 8: 12,288 for 768 x 768, 30,720 for 768 x 3072; with the adapter 2 r out + r + out."""
    delta = dw.attach(zoo.real("bert-base"), "spt")
    costs = {item.place.role: item.tuner.cost for item in delta.attached if item.member == 1}  # type: ignore[union-attr]
    assert costs["attention.q"] == costs["attention.o"] == 12_288
    assert costs["mlp.up"] == costs["mlp.down"] == 30_720
    delta = dw.attach(zoo.real("bert-base"), "spt", module="adapter")
    costs = {item.place.role: item.tuner.cost for item in delta.attached if item.member == 1}  # type: ignore[union-attr]
    assert costs["mlp.up"] == 2 * 8 * 3072 + 8 + 3072
    assert costs["mlp.down"] == 2 * 8 * 768 + 8 + 768
