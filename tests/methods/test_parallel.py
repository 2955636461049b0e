"""Parallel adapter: counts, what it reads, its scale, and LoRA as a special case."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import difference, disturb, frozen_output
from toy import Toy

import deltaworks as dw


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("bart-large", {"width": 512, "learned": False}, 25_202_688),
        ("t5-large", {"reduction": 2, "learned": True}, 50_405_424),
        ("t5-3b", {}, 50_405_424),
        ("t5-11b", {}, 50_405_424),
    ],
)
def test_counts(model: str, options: dict[str, object], expected: int) -> None:
    assert sum(p.numel() for p in dw.attach(zoo.real(model), "parallel", **options).parameters()) == expected


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama", "gpt2", "vit"])
def test_starts_as_the_base(family: str) -> None:
    model, inputs = zoo.ZOO[family]()
    delta = dw.attach(model, "parallel")
    assert torch.equal(zoo.output_of(family, model, inputs), frozen_output(family))
    assert all(tuner.scale.tolist() == [1.0] for tuner in delta.tuners())


def test_hand_example_and_linear_in_the_scale() -> None:
    added = []
    for scale in (4.0, 8.0):
        (tuner, _) = dw.attach(Toy(2), "parallel", width=1, learned=False, scale=scale).tuners()
        with torch.no_grad():
            tuner.D.copy_(torch.tensor([[1.0, -1.0]]))
            tuner.U.copy_(torch.tensor([[2.0], [0.0]]))
        added.append(tuner.around(lambda x: torch.tensor([5.0, 7.0]), torch.tensor([3.0, 1.0])))
    assert added[0].tolist() == [5.0 + 16.0, 7.0]
    assert added[1].tolist() == [5.0 + 32.0, 7.0]


def test_learned_scale_gets_the_gradient_of_the_added_vector() -> None:
    (tuner, _) = dw.attach(Toy(2), "parallel", width=1, scale=2.0).tuners()
    with torch.no_grad():
        tuner.D.copy_(torch.tensor([[1.0, -1.0]]))
        tuner.U.copy_(torch.tensor([[2.0], [0.5]]))
    out = tuner.around(torch.zeros_like, torch.tensor([3.0, 1.0]))
    assert out.tolist() == [8.0, 2.0]
    out.sum().backward()
    assert tuner.scale.grad.tolist() == [5.0]


@pytest.mark.parametrize(
    ("family", "entry", "inside"),
    [("llama", "model.layers.0.mlp", "model.layers.0.mlp.down_proj"),
     ("bert", "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.output.dense"),
     ("t5", "encoder.block.0.layer.1.DenseReluDense", "encoder.block.0.layer.1.DenseReluDense.wo"),
     ("bart", "model.encoder.layers.0.fc1", "model.encoder.layers.0.fc2")],
)  # fmt: skip
def test_reads_the_input_of_the_sublayer_and_not_its_output(family: str, entry: str, inside: str) -> None:
    model, inputs = zoo.ZOO[family]()
    stack = "encoder:" if family in ("t5", "bart") else ""
    delta = dw.attach(model, "parallel", targets=f"{stack}mlp@0", width=4)
    disturb(delta, size=0.3)
    (tuner,) = delta.tuners()
    entered: list[torch.Tensor] = []
    model.get_submodule(entry).register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    changed: list[torch.Tensor] = []
    change = tuner.change
    tuner.change = lambda x: changed.append(change(x)) or changed[-1]
    for _ in range(2):
        zoo.output_of(family, model, inputs)
        with torch.no_grad():
            model.get_submodule(inside).weight.zero_()
    torch.testing.assert_close(changed[0], F.relu(entered[0] @ tuner.D.T + tuner.b_D) @ tuner.U.T + tuner.b_U)
    assert torch.equal(changed[0], changed[1]), "F(x) = 0 must leave the adapter's vector as it was"


def test_identity_non_linearity_beside_a_linear_sublayer_is_lora() -> None:
    """The sub-layer is a linear F here: out = W x + s U D x, so B = U and A = D with the same scale."""
    torch.manual_seed(0)
    (tuner, _) = dw.attach(Toy(8), "parallel", width=3, activation="identity", learned=False, scale=2.0).tuners()
    with torch.no_grad():
        tuner.U.normal_()
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    parallel = tuner.around(linear, x)
    model = torch.nn.Sequential(linear, torch.nn.Linear(8, 8))
    lora = dw.attach(model, "lora", targets="0", rank=3, alpha=6)
    with torch.no_grad():
        lora.tuners()[0].A.copy_(tuner.D)
        lora.tuners()[0].B.copy_(tuner.U)
    torch.testing.assert_close(model[0](x), parallel)
    assert difference(model[0](x), F.linear(x, linear.weight, linear.bias)) > 0.1


def test_stands_beside_attention_too_where_asked() -> None:
    delta = dw.attach(zoo.real("bart-large"), "parallel", targets="attention,cross_attention", width=1)
    roles = [item.place.role for item in delta.attached]
    assert (roles.count("attention"), roles.count("cross_attention")) == (24, 12)
