"""HRA: hand-computed reflections, the rank-r form against the product, the published layer side by side, counts."""

from functools import reduce
from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of
from deltaworks.methods.reparametrized.orthogonal.hra import closeness


def attached(spec: str, shape: tuple[int, int] = (48, 32), **options: Any) -> tuple[nn.Sequential, Any, dw.Delta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta.tuners()[0], delta


def product(u: Tensor) -> Tensor:
    """H_1 .. H_r, each written out."""
    eye = torch.eye(len(u))
    return reduce(torch.matmul, [eye - 2 * torch.outer(v, v) / v.dot(v) for v in u.detach().T])


def test_a_reflection_by_hand() -> None:
    """u = (3, 4): H = [[.28, -.96], [-.96, -.28]]."""
    _, tuner, _ = attached("hra[rank=1,gram_schmidt=true]", (2, 2))
    with torch.no_grad():
        tuner.u.copy_(torch.tensor([[3.0], [4.0]]))
    torch.testing.assert_close(tuner.weight(torch.eye(2)), torch.tensor([[0.28, -0.96], [-0.96, -0.28]]))
    _, tuner, _ = attached("hra[rank=2]", (2, 2))
    with torch.no_grad():  # the second one reflects the first axis
        tuner.u.copy_(torch.tensor([[3.0, 5.0], [4.0, 0.0]]))
    torch.testing.assert_close(tuner.weight(torch.eye(2)), torch.tensor([[-0.28, -0.96], [0.96, -0.28]]))


@pytest.mark.parametrize("rank", [2, 8, 14])
def test_the_rank_r_step_equals_the_product(rank: int) -> None:
    model, tuner, delta = attached("hra", rank=rank)
    disturb(delta, size=0.5)
    H, module, x = product(tuner.u), model[0], torch.randn(3, 5, 32)
    weight: Any = module.weight.detach()
    torch.testing.assert_close(H @ H.T, torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(tuner.weight(weight), weight @ H, rtol=1e-4, atol=1e-5)
    expected = nn.functional.linear(x, weight @ H, module.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.linalg.svdvals(tuner.weight(weight)), torch.linalg.svdvals(weight), rtol=1e-4, atol=1e-5
    )
    change = delta.change(delta.attached[0])
    assert change is not None
    assert rank_of(change) == rank


def test_gradients_equal_those_of_the_product() -> None:
    _, tuner, delta = attached("hra[rank=4]")
    disturb(delta, size=0.5)
    weight, pull = torch.randn(48, 32), torch.randn(48, 32)
    mine = torch.autograd.grad((tuner.weight(weight) * pull).sum(), tuner.u)[0]
    u = tuner.u.detach().clone().requires_grad_()
    eye = torch.eye(32)
    H = reduce(torch.matmul, [eye - 2 * torch.outer(v, v) / v.dot(v) for v in u.T])
    theirs = torch.autograd.grad((weight @ H * pull).sum(), u)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_starts_with_twins_that_cancel() -> None:
    model, tuner, delta = attached("hra")
    u = tuner.u.detach()
    assert torch.equal(u[:, 0::2], u[:, 1::2])
    assert not torch.equal(u[:, 0], u[:, 2])
    x, module = torch.randn(4, 32), model[0]
    expected = nn.functional.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    model(x).square().sum().backward()
    assert module.weight.grad is None
    assert float(tuner.u.grad.abs().max()) > 0
    with pytest.raises(dw.UserError, match="rank 3 is odd"):
        attached("hra[rank=3]")
    assert delta.parameter_groups(1e-3, weight_decay=0.1)[0]["weight_decay"] == 0


def test_gram_schmidt() -> None:
    """I - 2 U U^T with U the orthonormal columns: not the base at the start, and finite."""
    model, tuner, _ = attached("hra[rank=5,gram_schmidt=true]")
    U = torch.linalg.qr(tuner.u.detach())[0]
    torch.testing.assert_close(tuner.weight(torch.eye(32)), torch.eye(32) - 2 * U @ U.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(tuner.weight(torch.eye(32)), product(U), rtol=0, atol=1e-5)
    x, module = torch.randn(4, 32), model[0]
    base = nn.functional.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    assert model(x).isfinite().all()
    assert (model(x) - base).abs().max() > 0.1
    with pytest.raises(dw.UserError, match="orthogonal already"):
        attached("hra[gram_schmidt=true,penalty=1]")


def test_the_penalty_is_that_of_unit_columns() -> None:
    """Twins: U^T U = [[1, 1], [1, 1]], so ||I - U^T U||^2 = 2; orthogonal columns of any length: 0."""
    assert float(closeness(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))) == 2
    _, tuner, delta = attached("hra[rank=2,penalty=0.5]", (2, 2))
    assert float(delta.procedure.loss(torch.tensor(3.0)).detach()) == pytest.approx(4.0, abs=1e-5)
    with torch.no_grad():
        tuner.u.copy_(torch.tensor([[3.0, -8.0], [4.0, 6.0]]))
    assert float(delta.procedure.loss(torch.tensor(3.0)).detach()) == pytest.approx(3.0, abs=1e-5)
    several = dw.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), "hra[rank=2,penalty=0.5]", targets="0,1")
    assert float(several.procedure.loss(torch.tensor(3.0)).detach()) == pytest.approx(5.0, abs=1e-5)  # each adds 1
    assert several.procedure.details()["hra_overlap"] == pytest.approx({"0": 2.0, "1": 2.0}, abs=1e-5)


def test_equals_peft() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16), torch.randn(3, 24)
    config = peft.HRAConfig(r=6, target_modules=["0"])
    theirs: Any = peft.get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    with torch.no_grad():
        wrapped.hra_u["default"].add_(0.5 * torch.randn(24, 6))
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    delta = dw.attach(model, "hra[rank=6]", targets="0")
    assert (expected - model(x)).abs().max() > 0.1
    with torch.no_grad():
        delta.parameters()[0].copy_(wrapped.hra_u["default"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "rank", "expected"), [((4096, 4096), 32, 131_072), ((48, 32), 8, 256)])
def test_counts(shape: tuple[int, int], rank: int, expected: int) -> None:
    assert attached("hra", shape, rank=rank)[2].report().trainable == expected


def test_count_on_deberta() -> None:
    """DeBERTaV3-base, six linears, r = 8: 0.66 M: 12 * 8 * (5 * 768 + 3072) = 663,552."""
    assert dw.attach(zoo.real("deberta-v3-base"), "hra").report().trainable == 663_552
