"""MPC: patterns of A and B by hand, the parallel adapter that the non-linear one is, counts."""

from typing import Any

import pytest
import torch
import zoo
from conformance import disturb
from torch import nn

import deltaworks as dw
from deltaworks.methods.procedures.mpc import distance


def attached(spec: str, **options: Any) -> tuple[nn.Sequential, Any, dw.Delta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8))
    delta = dw.attach(model, spec, **options)
    return model, delta.tuners()[0], delta


def constrained(options: str, rank: int = 2) -> tuple[nn.Sequential, Any, dw.Delta]:
    return attached(f"lora[rank={rank},targets='0']+mpc[{options}]")


def test_orthonormal_factors_and_zeros() -> None:
    """0 for orthonormal factors, 2 r for A = B = 0, and a mean of sqrt(r) without the squares."""
    A, B = torch.linalg.qr(torch.randn(10, 3))[0].T, torch.linalg.qr(torch.randn(8, 3))[0]
    for pattern in ("o", "d"):
        assert float(distance(A, B, pattern)) == pytest.approx(0, abs=1e-10)
    zero = torch.zeros(3, 10), torch.zeros(8, 3)
    assert float(distance(*zero, "o")) == pytest.approx(6)
    assert float(distance(*zero, "o", squared=False)) == pytest.approx(3**0.5)
    assert float(distance(*zero, "d")) == pytest.approx(3)


def test_orthogonal_columns_of_any_length() -> None:
    """B of columns of lengths 2 and 3: 0 for d, (4 - 1)^2 + (9 - 1)^2 = 73 for o; both see a slope."""
    A = torch.eye(2)
    B = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert float(distance(A, B, "d")) == 0
    assert float(distance(A, B, "o")) == pytest.approx(73)
    assert float(distance(A, B, "o", squared=False)) == pytest.approx(73**0.5 / 2)
    slanted = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert float(distance(A, slanted, "d")) == pytest.approx(2)
    assert float(distance(A, slanted, "o")) == pytest.approx(3)


def test_the_loss_gains_the_mean_over_the_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    delta = dw.attach(model, "lora[rank=2,targets='0,1']+mpc[weight=0.5]")
    tuners: list[Any] = delta.tuners()
    distances = [float(distance(tuner.A, tuner.B, "o").detach()) for tuner in tuners]
    loss = delta.procedure.loss(torch.tensor(1.0))
    assert float(loss.detach()) == pytest.approx(1 + 0.5 * sum(distances) / 2)
    assert list(delta.procedure.details()["mpc_distance"].values()) == distances
    for pattern in ("o", "d"):
        for squared in ("true", "false"):
            _, tuner, delta = constrained(f"pattern={pattern},squared={squared}")
            delta.procedure.loss(torch.tensor(1.0)).backward()
            assert float(tuner.A.grad.abs().max()) > 0
            assert tuner.B.grad.isfinite().all()  # also where B = 0 fits the pattern


def test_training_reaches_the_pattern() -> None:
    """Without a task, A and B become orthonormal."""
    _, tuner, delta = constrained("weight=1")
    disturb(delta, size=0.01)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        delta.procedure.loss(torch.zeros(())).backward()
        optimizer.step()
    assert float(distance(tuner.A, tuner.B, "o").detach()) < 1e-3
    torch.testing.assert_close(tuner.B.T @ tuner.B, torch.eye(2), rtol=0, atol=0.03)


@pytest.mark.parametrize("host", ["lora[rank=2]", "lora[rank=2,pissa=true]", "lora[rank=2,dora=true]"])
def test_stands_on_lora_and_its_kin_and_leaves_them_mergeable(host: str) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, f"{host}+mpc")
    assert len(delta.procedure.details()["mpc_distance"]) == len(delta.attached)
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("bert", model, inputs), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["ssl", "ssb"])
def test_beside_a_scaling_it_constrains_the_low_rank_part(scaling: str) -> None:
    """Reconstruction and extension at once: columns and rows are scaled, and s B A is held to its pattern."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8))
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    delta = dw.attach(model, f"{scaling}[targets='0']+lora[rank=2,targets='0']+mpc[weight=1]")
    disturb(delta, size=0.3)
    scaled, lora = (item.tuner for item in delta.attached)
    a: Any = scaled.columns
    c: Any = scaled.rows if scaling == "ssb" else torch.ones(8)
    low: Any = lora
    x = torch.randn(3, 10)
    expected = x @ (c[:, None] * weight * a + low.B @ low.A).T + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    added = delta.procedure.loss(torch.tensor(0.0))
    torch.testing.assert_close(added, distance(low.A, low.B, "o"))
    assert torch.autograd.grad(added, a, allow_unused=True) == (None,)
    delta.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_on_triplets_and_on_shared_factors() -> None:
    """AdaLoRA: P and Q; S2-LoRA: one pair for all weights of a shape, counted once."""
    _, tuner, delta = attached("adalora[rank=2,targets='0',gamma=0]+mpc")
    expected = float(distance(tuner.Q, tuner.P, "o").detach())
    assert list(delta.procedure.details()["mpc_distance"].values()) == [pytest.approx(expected)]
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    shared = dw.attach(model, "s2-lora[rank=2,targets='0,1']+mpc")
    assert len(shared.procedure.details()["mpc_distance"]) == 1


@pytest.mark.parametrize("host", ["bitfit", "ssl", "ssb", "lora-fa"])
def test_refuses_what_has_no_low_rank_matrices(host: str) -> None:
    with pytest.raises(dw.UserError, match=r"mpc constrains the A and B of low-rank changes.*as in 'lora\+mpc'"):
        dw.attach(zoo.ZOO["bert"]()[0], f"{host}+mpc")


def test_alone_it_stands_on_lora() -> None:
    delta = dw.attach(zoo.ZOO["bert"]()[0], "mpc")
    assert len(delta.procedure.details()["mpc_distance"]) == len(delta.attached) == 12


def test_the_non_linear_one_is_a_parallel_adapter_without_biases_and_does_not_merge() -> None:
    model, tuner, delta = attached("mpc-n[rank=2,alpha=4]", targets="0")
    x, module = torch.randn(3, 10), model[0]
    base = nn.functional.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    assert torch.equal(model(x), base)
    disturb(delta, size=0.5)
    expected = base + 2 * torch.relu(x @ tuner.A.T) @ tuner.B.T
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()


def test_count_on_roberta_base() -> None:
    """LoRA of rank 2 on all six linears; the constraint adds none."""
    for spec in ("lora[rank=2]+mpc", "mpc-n[rank=2]"):
        assert dw.attach(zoo.real("roberta-base"), spec).report().trainable == 331_776
