"""HUT: a hand-computed transformation, its backward pass, merging with and without a bias, and counts."""

from typing import Any

import pytest
import torch
import zoo
from conformance import disturb
from torch import nn

import deltaworks as dw
from deltaworks.methods.reparametrized.transform.hut import Hadamard, groups, transformed

CPU = torch.device("cpu")


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


def attached(out: int, inner: int, *, bias: bool = True, **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = linear(out, inner, bias=bias)
    delta = dw.attach(model, "hut", targets="0", **options)
    return model, delta, delta.tuners()[0]


def test_hand_example() -> None:
    """r = 2 on 4 x 4: M_A[0, 1] = 2 doubles the right half of row 0, M_B[1, 3] = 0.5 halves column 3 below."""
    _, _, tuner = attached(4, 4, rank=2)
    with torch.no_grad():
        tuner.A[0, 1] = 2
        tuner.B[1, 3] = 0.5
    W = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1], [2, 2, 2, 2]])
    assert tuner.weight(W).tolist() == [[1, 2, 6, 8], [5, 6, 7, 8], [1, 1, 1, 0.5], [2, 2, 2, 1]]


def test_rank_one_scales_both_sides() -> None:
    _, delta, tuner = attached(5, 3, rank=1, scale_shift=False)
    disturb(delta, size=0.5)
    W = torch.randn(5, 3)
    torch.testing.assert_close(tuner.weight(W), torch.diag(tuner.A[:, 0]) @ W @ torch.diag(tuner.B[0]))


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(6, 3, [0, 0, 1, 1, 2, 2]), (5, 2, [0, 0, 0, 1, 1]), (9, 4, [0, 0, 0, 1, 1, 2, 2, 3, 3]), (3, 3, [0, 1, 2])],
)
def test_groups_are_contiguous_and_none_is_empty(size: int, count: int, expected: list[int]) -> None:
    assert groups(size, count, CPU).tolist() == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48, 32), (31, 17)])
def test_start_and_merge(shape: tuple[int, int], bias: bool) -> None:
    model, delta, tuner = attached(*shape, bias=bias)
    W, b = model[0].weight, model[0].bias
    x = torch.randn(6, shape[1])
    base = nn.functional.linear(x, W, b)
    assert float((model(x) - base).detach().abs().max()) <= 1e-6
    disturb(delta, size=0.3)
    moved = model(x)
    assert float((moved - base).detach().abs().max()) > 0.1
    A, B = (factor.detach().double() for factor in (tuner.A, tuner.B))
    across, down = groups(shape[1], 8, CPU), groups(shape[0], 8, CPU)
    W_new = tuner.gamma.double()[:, None] * (A[:, across] * W.double() * B[down])
    expected = x.double() @ W_new.T + tuner.beta.double() + (b.double() if bias else 0)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)
    delta.merge()
    assert model[0].bias is not None
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)
    delta.unmerge()
    assert (model[0].bias is None) is not bias
    torch.testing.assert_close(model(x), moved, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(12, 8, 4), (11, 7, 3)])
def test_backward_equals_autograd(shape: tuple[int, int, int]) -> None:
    out, inner, rank = shape
    torch.manual_seed(0)
    W, A, B, G = torch.randn(out, inner), torch.randn(out, rank), torch.randn(rank, inner), torch.randn(out, inner)
    gradients = []
    for function in (Hadamard.apply, transformed):
        leaves = [tensor.clone().requires_grad_() for tensor in (W, A, B)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves, G))
    for own, automatic in zip(*gradients, strict=True):
        torch.testing.assert_close(own, automatic, rtol=1e-5, atol=1e-5)
    doubles = [tensor.double().requires_grad_() for tensor in (W, A, B)]
    assert torch.autograd.gradcheck(Hadamard.apply, doubles)


def test_nothing_but_the_input_is_kept_for_the_backward_pass() -> None:
    """Not W', nor anything of its size: it is made again."""
    model, _, tuner = attached(64, 64, bias=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore
        y = model(torch.randn(2, 64, requires_grad=True))
    assert kept == [2 * 64]
    y.sum().backward()
    assert tuner.A.grad is not None


def test_gradients_reach_all_four_tensors_at_the_first_step_and_no_other() -> None:
    model, delta, tuner = attached(48, 32)
    model(torch.randn(7, 32)).square().sum().backward()
    assert {name for name, _ in tuner.named_parameters()} == {"A", "B", "gamma", "beta"}
    for parameter in delta.parameters():
        assert parameter.grad is not None
        assert int((parameter.grad == 0).sum()) == 0
    assert model[0].weight.grad is None


def test_zeros_of_the_base_stay_zero_through_training() -> None:
    model, delta, tuner = attached(12, 8, rank=4)
    with torch.no_grad():
        model[0].weight[::2, ::3] = 0
    before = tuner.weight(model[0].weight).detach().clone()
    optimizer = torch.optim.AdamW(delta.parameter_groups(0.1))
    for _ in range(5):
        model(torch.randn(7, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tuner.weight(model[0].weight).detach()
    assert int((after == 0).sum()) == int((before == 0).sum()) == 6 * 3
    assert float((after - before).abs().max()) > 0.01


def test_weight_decay_leaves_the_factors_at_one() -> None:
    _, delta, _ = attached(12, 8, rank=4)
    assert {group["weight_decay"] for group in delta.parameter_groups(1e-3, weight_decay=0.1)} == {0.0}


def test_without_scale_and_shift_the_bias_stays() -> None:
    model, delta, _ = attached(12, 8, rank=4, scale_shift=False)
    bias = model[0].bias.clone()
    disturb(delta)
    delta.merge()
    assert torch.equal(model[0].bias, bias)


@pytest.mark.parametrize(("scale_shift", "expected"), [(True, 13_824), (False, 12_288)])
def test_count_of_one_square_matrix(scale_shift: bool, expected: int) -> None:
    delta = dw.attach(zoo.real("bert-base"), "hut", targets="attention.q", scale_shift=scale_shift)
    assert {sum(p.numel() for p in tuner.parameters()) for tuner in delta.tuners()} == {expected}


def test_count_of_a_matrix_that_is_not_square() -> None:
    _, delta, _ = attached(48, 32)
    assert delta.report().trainable == 8 * (32 + 48) + 2 * 48


def test_two_that_multiply_do_not_act_together() -> None:
    model, _, _ = attached(12, 8, rank=4)
    dw.attach(model, "hut", targets="0", rank=4, name="two")
    with pytest.raises(dw.UserError, match="cannot be summed"):
        dw.switch(model, ["default", "two"])
    with pytest.raises(dw.UserError, match="rank 9 is larger"):
        attached(12, 8, rank=9)
