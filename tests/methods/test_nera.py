"""NeRA: the hats by hand, the backward pass, the start, linear maps, refusals and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.nera import Phi, hats


def linear(out: int, inner: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out))


def attached(out: int, inner: int, **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = linear(out, inner)
    delta = dw.attach(model, "nera", targets="0", **options)
    return model, delta, delta.tuners()[0]


def base_of(model: nn.Sequential, x: Tensor) -> Tensor:
    return nn.functional.linear(x, model[0].weight, model[0].bias)


def dense(x: Tensor, s: Tensor, t: Tensor, c: Tensor, h: float) -> Tensor:
    """phi with the whole basis [..., in, K]."""
    basis = torch.relu(1 - ((s * x)[..., None] - t).abs() / h)
    return torch.einsum("...dj,djk->...k", basis, c)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.5, [0, 0, 0, 0.0714, 0.9286, 0.2143, 0, 0]),
        (0.0, [0, 0, 0, 0.5714, 0.5714, 0, 0, 0]),
        (4.1, [0] * 8),
        (-4.1, [0] * 8),
    ],
)
def test_basis_by_hand(x: float, expected: list[float]) -> None:
    """K = 8 knots from -3 to 3, half-width 1: no partition of unity, and nothing beyond 4."""
    tuner = attached(2, 1)[2]
    assert tuner.half_width == 1
    found = torch.stack([hats(torch.tensor([x]), tuner.s, tuner.t[:, j], 1.0) for j in range(8)], dim=-1)
    torch.testing.assert_close(found[0].detach(), torch.tensor(expected, dtype=torch.float32), atol=5e-5, rtol=0)
    if x == 0:
        assert float(found.detach().sum()) == pytest.approx(1.1429, abs=5e-5)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
@pytest.mark.parametrize("h", [1.0, 0.6])
def test_phi_and_its_backward_equal_autograd(shape: tuple[int, ...], h: float) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(*size, dtype=torch.float64) for size in (shape, (4,), (4, 6), (4, 6, 3))]
    G = torch.randn(*shape[:-1], 3, dtype=torch.float64)
    results = []
    for function in (Phi.apply, dense):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        y = function(*own, h)
        results.append((y, *torch.autograd.grad(y, own, G)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_against_the_formula() -> None:
    model, delta, tuner = attached(6, 4, rank=3, knots=5, scale=2.0)
    disturb(delta, size=0.5)
    x = torch.randn(2, 7, 4)
    expected = base_of(model, x) + tuner.a * dense(x, tuner.s, tuner.t, tuner.c, 1.0) @ tuner.R.T
    assert difference(model(x), base_of(model, x)) > 0.1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    """The hats would be K = 8 times the input."""
    model, _, _ = attached(64, 64, rank=2)
    x = torch.randn(100, 64)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):  # type: ignore
        y = model(x)
    assert [size for size in kept.values() if size >= x.numel()] == [x.numel()]
    y.sum().backward()


def test_start() -> None:
    """The base exactly; with the published start, away from it in proportion to the gain."""
    x = torch.randn(5, 32)
    model = attached(48, 32)[0]
    assert float((model(x) - base_of(model, x)).detach().abs().max()) <= 1e-6
    moved = []
    for scale in (1.0, 64.0):
        model = attached(48, 32, init="normal", scale=scale)[0]
        moved.append(float((model(x) - base_of(model, x)).detach().norm()))
    assert moved[0] > 1e-4
    assert moved[1] / moved[0] == pytest.approx(64, rel=1e-3)


def test_gradients_reach_every_tensor_and_not_the_base() -> None:
    model, delta, tuner = attached(48, 32)
    model(torch.randn(20, 32)).square().sum().backward()
    assert float(tuner.c.grad.abs().max()) > 0, "at the first step c moves"
    disturb(delta)
    model(torch.randn(20, 32)).square().sum().backward()
    assert {name for name, _ in tuner.named_parameters()} == {"s", "t", "c", "R", "a"}
    assert all(float(p.grad.abs().max()) > 0 for p in tuner.parameters())
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None


def test_hats_as_wide_as_their_spacing_hold_a_linear_map() -> None:
    """c_djk = M_kd t_dj gives phi(x) = M x between the outer knots, and not with hats of half-width 1."""
    torch.manual_seed(1)
    M = torch.randn(3, 4)
    x = 6 * torch.rand(50, 4) - 3
    close = {}
    for kind in ("spacing", "unit"):
        model, _, tuner = attached(6, 4, rank=3, hats=kind)
        with torch.no_grad():
            tuner.c.copy_(M.T[:, None] * tuner.t[..., None])
        close[kind] = difference(model(x) - base_of(model, x), x @ (tuner.R @ M).T)
    assert close["spacing"] < 1e-5
    assert close["unit"] > 0.05


def test_no_merging_and_disabling_is_exact() -> None:
    model, delta, _ = attached(6, 4)
    x = torch.randn(5, 4)
    disturb(delta)
    assert difference(model(x), base_of(model, x)) > 1e-3
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()
    with delta.disabled():
        assert torch.equal(model(x), base_of(model, x))


class Attention(nn.Module):
    """Projections with the names of an image transformer: the output projection is the first of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](self.to_q(x) + self.to_k(x) + self.to_v(x)))


def test_a_target_that_ends_in_a_number_is_adapted() -> None:
    model = Attention()
    x = torch.randn(3, 8)
    base = model(x)
    delta = dw.attach(model, "nera", targets=["to_q", "to_k", "to_v", "to_out.0"], rank=2)
    assert {item.place.path for item in delta.attached} == {"to_q", "to_k", "to_v", "to_out.0"}
    only = dw.attach(model, "nera", targets="to_out.0", rank=2, name="only")
    disturb(only)
    assert float((model(x) - base).detach().abs().max()) > 1e-4


def test_saved_and_loaded_give_equal_outputs(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "nera", rank=4, train_scale=False, scale=3.0)
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), moved)


@pytest.mark.parametrize(("train_scale", "expected"), [(True, 1_797_121), (False, 1_797_120)])
def test_worked_count(train_scale: bool, expected: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3072, 3072))
    delta = dw.attach(model, "nera", targets="0", rank=64, train_scale=train_scale)
    assert delta.report().trainable == expected


def test_counts_on_real_shapes() -> None:
    """T5-large, query and value of the self-attention: 96 matrices of 1024 x 1024."""
    one = 8 * 16 * 1024 + 8 * 1024 + 1024 + 16 * 1024 + 1
    assert dw.attach(zoo.real("t5-large"), "nera", targets="attention.q,attention.v").report().trainable == 96 * one


def test_weight_decay_leaves_the_gains() -> None:
    _, delta, _ = attached(6, 4)
    assert {group["weight_decay"] for group in delta.parameter_groups(1e-3, weight_decay=0.1)} == {0.0}
