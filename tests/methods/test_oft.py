"""OFT: hand-computed rotations, kept angles, the published layer side by side, published counts."""

from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.orthogonal.rotations import cayley, turned


def attached(spec: str, shape: tuple[int, int] = (48, 32), **options: Any) -> tuple[nn.Sequential, Any, dw.Delta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta.tuners()[0], delta


def dense(delta: dw.Delta) -> Tensor:
    """R [in, in] of the only tuner, from the change of the identity."""
    tuner: Any = delta.tuners()[0]
    return tuner.weight(torch.eye(tuner.slices * tuner.side)).detach().T


def test_rotations_by_hand() -> None:
    """b = 2, q = 0.1, and the inverse rotation where the series is taken: ||R^T R - I||_F = 2.8e-4."""
    _, tuner, delta = attached("oft[block=2]", (2, 2))
    with torch.no_grad():
        tuner.triangle.fill_(0.1)
    expected = torch.tensor([[0.9802, -0.1980], [0.1980, 0.9802]])
    torch.testing.assert_close(dense(delta), expected, rtol=0, atol=5e-5)
    _, tuner, delta = attached("oft[block=2,series=true]", (2, 2))
    with torch.no_grad():
        tuner.triangle.fill_(0.1)
    R = dense(delta)
    torch.testing.assert_close(R, torch.tensor([[0.9801, 0.1980], [-0.1980, 0.9801]]), rtol=0, atol=5e-5)
    assert float((R.T @ R - torch.eye(2)).norm()) == pytest.approx(2.8e-4, abs=0.1e-4)


def test_the_triangle_is_read_row_by_row() -> None:
    _, tuner, _ = attached("oft[block=4]", (3, 4))
    with torch.no_grad():
        tuner.triangle.copy_(torch.arange(1.0, 7.0))
    expected = [[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
    assert tuner.skew().tolist() == [expected]


def test_turned_inputs_equal_a_turned_weight() -> None:
    """x R through the layer, W R^T in the weight; slices of x [.., b] times R_i; bias untouched."""
    model, tuner, delta = attached("oft[block=8]")
    disturb(delta)
    x, R = torch.randn(3, 5, 32), torch.block_diag(*tuner.rotations(tuner.skew()).detach())
    torch.testing.assert_close(dense(delta), R)
    module: Any = model[0]
    expected = (x @ R) @ module.weight.T + module.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_angles_between_rows_stay_within_a_block() -> None:
    _, tuner, delta = attached("oft[block=16]")
    disturb(delta, size=1.0)
    weight = torch.randn(48, 32)
    moved = tuner.weight(weight).detach()
    assert (moved - weight).abs().max() > 0.5
    for columns in (slice(0, 16), slice(16, 32)):
        before, after = weight[:, columns], moved[:, columns]
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-4)


def test_cayley_is_orthogonal() -> None:
    Q = torch.randn(5, 7, 7).triu(1)
    R = cayley(Q - Q.mT)
    torch.testing.assert_close(R @ R.mT, torch.eye(7).expand(5, 7, 7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("slices", [1, 8])
def test_the_blocks_are_not_copied_for_every_row(slices: int) -> None:
    """What the backward pass keeps of 500 rows of 64 inputs: the rows and the blocks, never 500 x 64 x 8."""
    x, R = torch.randn(5, 100, 64, requires_grad=True), torch.randn(slices, 8, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore
        y = turned(x, R)
    assert max(tensor.numel() for tensor in kept) == 500 * 64
    torch.testing.assert_close(y, x @ torch.block_diag(*R.expand(8, 8, 8)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["oft", "oft[series=true]", "oft[share=true,block=8]", "oft[blocks=2]"])
def test_starts_as_the_base(spec: str) -> None:
    model, _, delta = attached(spec)
    x = torch.randn(4, 32)
    module: Any = model[0]
    torch.testing.assert_close(model(x), nn.functional.linear(x, module.weight, module.bias), rtol=0, atol=1e-6)
    model(x).square().sum().backward()
    assert module.weight.grad is None
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in delta.parameters() if parameter.grad is not None)


def test_one_rotation_for_all_slices() -> None:
    model, tuner, delta = attached("oft[share=true,block=8]")
    disturb(delta)
    R = dense(delta)
    for slice_ in range(4):
        torch.testing.assert_close(R[8 * slice_ : 8 * slice_ + 8, 8 * slice_ : 8 * slice_ + 8], R[:8, :8])
    assert tuner.triangle.shape == (1, 28)
    x, module = torch.randn(3, 32), model[0]
    expected = nn.functional.linear(x @ R, module.weight, module.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inner", "options", "side"),
    [
        (768, {}, 32),
        (768, {"block": 33}, 32),
        (27, {}, 27),
        (48, {"block": 20}, 16),  # 16 and 24 are as near
        (48, {"blocks": 5}, 8),  # 9.6: 8 is nearer than 12
        (128, {"blocks": 8}, 16),
        (7, {"block": 2}, 7),
    ],
)
def test_blocks_divide_the_inputs(inner: int, options: dict[str, Any], side: int) -> None:
    assert attached("oft", (4, inner), **options)[1].side == side


def test_constrained_rotations_stay_near_the_identity() -> None:
    """eps 0.5 over 4 slices: ||Q_i||_F is cut to 0.25, and a smaller one is left alone."""
    _, tuner, delta = attached("oft[block=8,eps=0.5]")
    with torch.no_grad():
        tuner.triangle[0] = 1.0
        tuner.triangle[1] = 1e-3
    delta.procedure.stepped()
    norms = torch.linalg.matrix_norm(tuner.skew().detach())
    torch.testing.assert_close(norms, torch.tensor([0.25, 1e-3 * 56**0.5, 0.0, 0.0]))
    assert delta.procedure.details()["oft_turned"] == pytest.approx({"0": (0.25**2 + 56e-6) ** 0.5}, rel=1e-4)
    _, tuner, delta = attached("oft[block=8,eps=0]")
    disturb(delta)
    delta.procedure.stepped()
    assert float(tuner.triangle.detach().abs().max()) == 0


def test_dropout_leaves_whole_slices_alone() -> None:
    model, _, delta = attached("oft[block=4,dropout=0.5]", (32, 32))
    disturb(delta, size=1.0)
    module: Any = model[0]
    with torch.no_grad():
        module.weight.copy_(torch.eye(32))
        module.bias.zero_()
    x = torch.randn(1, 32)
    moved = ((model.train()(x) - x).view(8, 4).abs().amax(dim=1) > 1e-3).tolist()
    assert True in moved
    assert False in moved
    assert torch.equal(model.eval()(x), model(x))


def test_refusals() -> None:
    with pytest.raises(dw.UserError, match="block and blocks say the same thing"):
        attached("oft[block=4,blocks=2]")
    with pytest.raises(dw.UserError, match="the 1 inputs of '0' cannot be cut into blocks"):
        attached("oft", (4, 1))
    with pytest.raises(dw.UserError, match="'0' is no linear layer"):
        dw.attach(nn.Sequential(nn.Conv2d(3, 4, 3)), "oft[dropout=0.1]", targets="0")


@pytest.mark.parametrize(("series", "share"), [(False, False), (True, False), (True, True)])
def test_equals_peft(series: bool, share: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16), torch.randn(3, 24)
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["0"], use_cayley_neumann=series, block_share=share)
    theirs: Any = peft.get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    with torch.no_grad():
        wrapped.oft_R["default"].weight.normal_(std=0.1)
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    delta = dw.attach(model, "oft", block=8, series=series, share=share, targets="0")
    assert (expected - model(x)).abs().max() > 0.1
    with torch.no_grad():
        delta.parameters()[0].copy_(wrapped.oft_R["default"].weight)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((768, 768), {"block": 32}, 11_904),
        ((128, 128), {"blocks": 8}, 960),
        ((48, 32), {"block": 8}, 4 * 28),
        ((48, 32), {"block": 8, "share": True}, 28),
    ],
)
def test_counts(shape: tuple[int, int], options: dict[str, Any], expected: int) -> None:
    assert attached("oft", shape, **options)[2].report().trainable == expected


def test_count_on_llama_2_7b() -> None:
    """Seven linears, b = 32: 17.65 M (the paper of OFTv2): 32 * 31 / 2 * (6 * 4096 + 11008)."""
    delta = dw.attach(zoo.real("llama-7b"), "oft")
    assert delta.report().trainable == 32 * 31 * (6 * 4096 + 11008) // 2 == 17_649_664
