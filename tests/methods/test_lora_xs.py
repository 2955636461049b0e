"""LoRA-XS: the frozen singular factors, their return from the base, what is trained, and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of
from deltaworks.methods.reparametrized.lora_xs import principal


def attached(spec: str = "lora-xs[rank=4]", **options: Any) -> tuple[Any, dw.Delta, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta, delta.tuners()[0]


def spectrum(values: list[float], out: int, inner: int) -> Tensor:
    """A matrix [out, in] with these singular values."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(out, len(values))).Q, torch.linalg.qr(torch.randn(inner, len(values))).Q
    return U @ torch.diag(torch.tensor(values)) @ V.T


def test_factors_are_the_principal_part_with_the_singular_values_on_the_input_side() -> None:
    W = spectrum([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], 48, 32)
    A, B = principal(W, 3, torch.Generator().manual_seed(0))
    assert (A.shape, B.shape) == ((3, 32), (48, 3))
    torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(A @ A.T, torch.diag(torch.tensor([25.0, 9.0, 4.0])), rtol=1e-4, atol=1e-4)
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, U[:, :3] @ torch.diag(S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)


def test_factors_do_not_depend_on_the_random_start() -> None:
    """Where the singular values are apart; the signs of the vectors are fixed."""
    W = spectrum([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], 48, 32)
    pairs = [principal(W, 3, torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
    for A, B in pairs[1:]:
        torch.testing.assert_close(A, pairs[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B, pairs[0][1], rtol=1e-4, atol=1e-5)
    largest = pairs[0][1].gather(0, pairs[0][1].abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_the_power_iterations_find_them_in_a_matrix_wider_than_the_sample() -> None:
    W = spectrum([0.8**i for i in range(40)], 60, 50)
    A, B = principal(W, 4, torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], rtol=1e-4, atol=1e-5)


def test_change_is_the_closed_form() -> None:
    """s B R A with alpha 12 at rank 4: s = 3."""
    model, delta, tuner = attached("lora-xs[rank=4,alpha=12]")
    x = torch.randn(5, 32)
    base = model(x)
    torch.manual_seed(1)
    with torch.no_grad():
        tuner.R.normal_()
    expected = 3 * tuner.B @ tuner.R @ tuner.A
    torch.testing.assert_close(tuner.weight(torch.zeros(48, 32)), expected)
    torch.testing.assert_close(model(x), base + x @ expected.T, rtol=1e-5, atol=1e-5)
    change = delta.change(delta.attached[0])
    assert change is not None
    assert rank_of(change) == 4
    with torch.no_grad():
        tuner.R.copy_(torch.eye(4) / 3)
    weight = model[0].weight.detach()
    values = torch.linalg.svdvals(weight - tuner.weight(torch.zeros(48, 32)))
    torch.testing.assert_close(values[:28], torch.linalg.svdvals(weight)[4:], rtol=1e-4, atol=1e-5)


def test_starts_as_the_base_and_only_R_gets_a_gradient() -> None:
    model, delta, tuner = attached()
    x = torch.randn(5, 32)
    torch.manual_seed(0)
    assert torch.equal(model(x), nn.Linear(32, 48)(x))
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(tuner.R.grad, (2 * y.detach() @ tuner.B).T @ (x @ tuner.A.T), rtol=1e-4, atol=1e-4)
    assert float(tuner.R.grad.abs().max()) > 0
    assert [p.shape for p in delta.parameters()] == [(4, 4)]
    assert not tuner.A.requires_grad
    assert not tuner.B.requires_grad


def test_saved_without_the_factors(tmp_path: Path) -> None:
    model, delta, tuner = attached("lora-xs[rank=4]", seed=3)
    with torch.no_grad():
        tuner.R.normal_()
    assert {name: tensor.shape for name, tensor in delta.tensors().items()} == {"0.R": (4, 4)}
    x = torch.randn(5, 32)
    moved = model(x)
    delta.save(tmp_path)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(32, 48))
    torch.manual_seed(99)
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(x), moved)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5 * float(moved.detach().abs().max()))


def test_rank_is_checked() -> None:
    with pytest.raises(dw.UserError, match="rank 33 is larger than '0' allows"):
        attached("lora-xs[rank=33]")


QV = "attention.q,attention.v"
T5_QV = f"{QV},cross_attention.q,cross_attention.v"


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("roberta-base", QV, 16, 24 * 256),
        ("deberta-v3-base", "linear", 136, 72 * 136**2),
        ("t5-large", T5_QV, 16, 144 * 256),
        ("t5-3b", T5_QV, 16, 144 * 256),
        ("t5-11b", T5_QV, 16, 144 * 256),
    ],
)
def test_counts(name: str, targets: str, rank: int, expected: int) -> None:
    """r^2 for each weight, whatever its size."""
    assert dw.attach(zoo.real(name), "lora-xs", targets=targets, rank=rank).report().trainable == expected
