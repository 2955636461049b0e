"""SSL and SSB: hand-computed scalings, (IA)^3 as a case, published counts."""

from typing import Any

import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw


def attached(spec: str, weight: Tensor, bias: Tensor | None = None) -> tuple[nn.Sequential, Any, dw.Delta]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    model = nn.Sequential(linear)
    delta = dw.attach(model, spec, targets="0")
    return model, delta.tuners()[0], delta


@torch.no_grad()
def fill(tuner: Any, a: list[float], c: list[float] | None = None) -> None:
    tuner.columns.copy_(torch.tensor(a))
    if c is not None:
        tuner.rows.copy_(torch.tensor(c))


HAND = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_by_hand() -> None:
    """W = [[1, 2], [3, 4]], a = (1, 0.5), c = (10, 1): [[1, 1], [3, 2]] and [[10, 10], [3, 2]]."""
    model, tuner, delta = attached("ssl", HAND)
    fill(tuner, [1.0, 0.5])
    assert model(torch.eye(2)).T.tolist() == [[1.0, 1.0], [3.0, 2.0]]
    delta.merge()
    assert model[0].weight.tolist() == [[1.0, 1.0], [3.0, 2.0]]  # type: ignore[union-attr, operator]
    model, tuner, delta = attached("ssb", HAND)
    fill(tuner, [1.0, 0.5], [10.0, 1.0])
    assert model(torch.eye(2)).T.tolist() == [[10.0, 10.0], [3.0, 2.0]]
    delta.merge()
    assert model[0].weight.tolist() == [[10.0, 10.0], [3.0, 2.0]]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("spec", ["ssl", "ssb"])
def test_the_bias_is_not_scaled(spec: str) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 5, 4)
    model, tuner, delta = attached(spec, weight, bias)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, bias), rtol=0, atol=1e-6)
    disturb(delta, size=0.5)
    rows = tuner.rows if spec == "ssb" else torch.ones(6)
    expected = nn.functional.linear(x, rows[:, None] * weight * tuner.columns, bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(model(torch.zeros(1, 4))[0], bias)
    moved = model(x)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=0, atol=2e-6)
    assert torch.equal(model[0].bias, bias)  # type: ignore[arg-type, union-attr]


def test_a_bias_that_another_method_trains_is_not_scaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    delta = dw.attach(model, "ssb[targets='0']+bitfit[targets='0']")
    disturb(delta, size=0.5)
    x = torch.randn(3, 8)
    moved, tuners = model(x), delta.tuners()
    moved.sum().backward()
    torch.testing.assert_close(tuners[1].change.grad, torch.full((6,), 3.0))
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_with_ones_it_is_ia3_or_ssl() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    ssb, both, _ = attached("ssb", weight)
    ia3, rows, _ = attached("ia3", weight)
    c = torch.randn(4)
    fill(both, [1.0] * 3, c.tolist())
    with torch.no_grad():
        rows.scale.copy_(c)
    torch.testing.assert_close(ssb(x), ia3(x))
    ssl, columns, _ = attached("ssl", weight)
    fill(both, [0.5, 2.0, -1.0], [1.0] * 4)
    fill(columns, [0.5, 2.0, -1.0])
    torch.testing.assert_close(ssb(x), ssl(x))


@pytest.mark.parametrize(("spec", "trained"), [("ssl", 1), ("ssb", 2)])
def test_gradients_reach_the_vectors_alone_and_decay_does_not(spec: str, trained: int) -> None:
    model, _, delta = attached(spec, HAND, torch.ones(2))
    model(torch.randn(3, 2)).square().sum().backward()
    assert [float(p.grad.abs().min()) > 0 for p in delta.parameters() if p.grad is not None] == [True] * trained
    assert all(parameter.grad is None for parameter in (model[0].weight, model[0].bias))
    assert [group["weight_decay"] for group in delta.parameter_groups(1e-3, weight_decay=0.1)] == [0.0]


TARGETS = "attention.q,attention.v,mlp.up"


@pytest.mark.parametrize(
    ("spec", "expected"), [("ssl", 27_648), (f"ia3[targets='{TARGETS}']", 55_296), ("ssb", 82_944)]
)
def test_counts_on_roberta_base(spec: str, expected: int) -> None:
    assert dw.attach(zoo.real("roberta-base"), spec).report().trainable == expected


@pytest.mark.parametrize(
    ("spec", "expected"), [("ssl", 73_728), (f"ia3[targets='{TARGETS}']", 147_456), ("ssb", 221_184)]
)
def test_counts_on_the_shapes_of_roberta_large(spec: str, expected: int) -> None:
    """BERT-large has the same blocks: (d, d), (d, d) and (d, 4 d) with d = 1024, 24 times."""
    assert dw.attach(zoo.real("bert-large"), spec).report().trainable == expected
