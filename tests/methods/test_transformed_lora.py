"""Transformed LoRA: the rings against their definitions, the factored forward, the start, penalties and counts."""

import itertools
from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.tensor.tensors import padded_split, ring_matrix, ring_open, ring_product


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


def attached(out: int, inner: int, **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = linear(out, inner)
    delta = dw.attach(model, "transformed-lora", targets="0", **options)
    return model, delta, delta.tuners()[0]


def trace_of(cores: list[Tensor]) -> float:
    found = cores[0]
    for core in cores[1:]:
        found = found @ core
    return float(found.trace())


def indices(modes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Row-major multi-indices."""
    return list(itertools.product(*(range(mode) for mode in modes)))


def test_transform_entries_are_traces() -> None:
    torch.manual_seed(0)
    modes = (2, 3, 2)
    A = [torch.randn(mode, mode, 3, 3, dtype=torch.float64) for mode in modes]
    T = ring_matrix(A)
    assert T.shape == (12, 12)
    for row, i in enumerate(indices(modes)):
        for column, j in enumerate(indices(modes)):
            expected = trace_of([core[p, q] for core, p, q in zip(A, i, j, strict=True)])
            assert float(T[row, column]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("residual", ["ring", "lora"])
def test_residual_entries_are_traces(residual: str) -> None:
    _, delta, tuner = attached(6, 8, modes=2, residual_rank=3, residual=residual)
    disturb(delta, size=0.5)
    down, up = tuner.residual()
    D = (up @ down).detach()
    if residual == "lora":
        torch.testing.assert_close(D, (tuner.C[0] @ tuner.B[0]).detach())
        return
    outs, ins = padded_split(6, 2), padded_split(8, 2)
    for row, j in enumerate(indices(outs)):
        for column, i in enumerate(indices(ins)):
            cores = [core.detach()[p] for core, p in zip((*tuner.B, *tuner.C), (*i, *j), strict=True)]
            assert float(D[row, column]) == pytest.approx(trace_of(cores), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("modes", [(4, 3), (2, 3, 2), (2, 2, 3, 2)])
def test_product_core_by_core_is_the_dense_one(modes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    A = [torch.randn(mode, mode, 2, 2, dtype=torch.float64) for mode in modes]
    T = ring_matrix(A)
    for shape in ((), (5,), (2, 3)):
        x = torch.randn(*shape, len(T), dtype=torch.float64)
        torch.testing.assert_close(ring_product(A, x), x @ T.T)


def test_rank_one_and_two_modes_are_a_kronecker_product() -> None:
    torch.manual_seed(0)
    A = [torch.randn(2, 2, 1, 1), torch.randn(3, 3, 1, 1)]
    torch.testing.assert_close(ring_matrix(A), torch.kron(A[0][..., 0, 0], A[1][..., 0, 0]))


@pytest.mark.parametrize(("modes", "rank"), [(2, 3), (3, 2), (2, 1), (4, 2)])
def test_transform_starts_as_the_identity(modes: int, rank: int) -> None:
    """6 = 2 x 3 with R = 3, and others; the output is the base's."""
    model, _, tuner = attached(5, 6, modes=modes, transform_rank=rank)
    if (modes, rank) == (2, 3):
        assert [tuple(core.shape) for core in tuner.T] == [(2, 2, 3, 3), (3, 3, 3, 3)]
    T = ring_matrix(tuner.T).detach()[:6, :6]
    assert float((T - torch.eye(6)).abs().max()) <= 1e-6
    x = torch.randn(4, 6)
    assert float((model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)).detach().abs().max()) <= 1e-6


@pytest.mark.parametrize("residual", ["ring", "lora"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (31, 17)])
def test_factored_forward_dense_weight_and_merge_agree(shape: tuple[int, int], residual: str) -> None:
    """Also where a prime size is padded."""
    model, delta, tuner = attached(*shape, residual=residual)
    disturb(delta, size=0.1)
    x = torch.randn(4, 3, shape[1])
    T = ring_matrix(tuner.T)[: shape[1], : shape[1]]
    down, up = tuner.residual()
    W = model[0].weight @ T + up @ down
    moved = model(x)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert difference(moved, base) > 0.01
    assert difference(moved, x @ W.T + model[0].bias) < 1e-5
    assert difference(tuner.weight(model[0].weight), W) < 1e-5
    delta.merge()
    assert difference(model(x), moved) < 1e-5


def test_first_gradients() -> None:
    """While B^1 is zero D is zero and only B^1 of its cores gets a gradient; the transform's get theirs at once."""
    model, delta, tuner = attached(48, 32)
    (down, up) = tuner.residual()
    assert float((up @ down).detach().abs().max()) == 0
    model(torch.randn(7, 32)).square().sum().backward()
    assert float(tuner.B[0].grad.abs().min()) > 0
    assert all(float(core.grad.abs().max()) == 0 for core in (*tuner.B[1:], *tuner.C))
    assert all(float(core.grad.abs().min()) > 0 for core in tuner.T)
    disturb(delta)
    model(torch.randn(7, 32)).square().sum().backward()
    assert all(float(core.grad.abs().max()) > 0 for core in (*tuner.B[1:], *tuner.C))


def test_transform_is_invertible_near_the_start() -> None:
    _, delta, tuner = attached(48, 32)
    disturb(delta, size=0.05)
    T = ring_matrix(tuner.T).detach()
    assert float((T - torch.eye(32)).abs().max()) > 0.05
    assert int(torch.linalg.matrix_rank(T)) == 32


def test_special_transforms() -> None:
    """Diagonal cores scale the inputs; block-diagonal orthogonal ones with R = 1 turn blocks (OFT)."""
    _, _, tuner = attached(6, 6, modes=2, transform_rank=1)
    with torch.no_grad():
        tuner.T[0].copy_(torch.diag(torch.tensor([2.0, 3.0]))[..., None, None])
        tuner.T[1].copy_(torch.diag(torch.tensor([1.0, 5.0, 7.0]))[..., None, None])
    W = torch.randn(6, 6)
    torch.testing.assert_close(tuner.weight(W), W * torch.tensor([2.0, 10, 14, 3, 15, 21]))
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    with torch.no_grad():
        tuner.T[0].copy_(torch.eye(2)[..., None, None])
        tuner.T[1].copy_(turn[..., None, None])
    torch.testing.assert_close(tuner.weight(W), W @ torch.block_diag(turn, turn), rtol=1e-5, atol=1e-5)


def test_penalties() -> None:
    """Zero at the start; then by hand: one entry of one core moved by 0.5."""
    model, delta, tuner = attached(6, 6, modes=2, transform_rank=1, identity_penalty=2.0, orthogonal_penalty=4.0)
    assert [float(value) for value in tuner.penalties()] == [0.0, 0.0]
    one = torch.ones(())
    assert float(delta.procedure.loss(one)) == 1.0
    with torch.no_grad():
        tuner.T[0][0, 0] += 0.5  # diag(1.5, 1): M^T M - I = diag(1.25, 0)
    assert [float(value) for value in tuner.penalties()] == [0.25, 1.5625]
    assert float(delta.procedure.loss(one)) == 1 + 2 * 0.25 + 4 * 1.5625
    assert delta.procedure.details() == {"transformed_lora_R_I": {"0": 0.25}, "transformed_lora_R_O": {"0": 1.5625}}
    assert float(attached(6, 6, modes=2, transform_rank=3)[2].penalties()[0]) == 0.0
    torch.testing.assert_close(attached(6, 6, modes=2, transform_rank=3)[2].penalties()[1], torch.zeros(()))
    delta.procedure.loss(model(torch.randn(3, 6)).sum() * 0).backward()
    assert float(tuner.T[0].grad[0, 0]) == pytest.approx(2 * 2 * 0.5 + 4 * 2 * 1.25 * 2 * 1.5)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [(320, {"modes": 2}, 3_776), (768, {}, 1_984), (320, {"modes": 2, "residual": "lora"}, 4 * 656 + 4 * 640)],
)
def test_worked_counts(size: int, options: dict[str, Any], expected: int) -> None:
    """320 = 16 x 20 and 768 = 8 x 8 x 12, with R = 2 and Q = 4."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(size, size))
    assert dw.attach(model, "transformed-lora", targets="0", **options).report().trainable == expected


def test_counts_on_real_shapes() -> None:
    """T5-large, 1024 = 8 x 8 x 16: 4 * 384 + 16 * 64 for each of 192 projections of the self-attention."""
    delta = dw.attach(
        zoo.real("t5-large"), "transformed-lora", targets="attention.q,attention.k,attention.v,attention.o"
    )
    assert delta.report().trainable == 192 * (4 * 384 + 16 * 64)
    bert = dw.attach(zoo.real("bert-base"), "transformed-lora", targets="attention.q,attention.v")
    assert bert.report().trainable == 24 * 1_984


def test_modes_of_awkward_sizes_are_padded() -> None:
    assert padded_split(31, 3) == (2, 4, 4)
    assert padded_split(768, 3) == (8, 8, 12)
    assert ring_open([torch.ones(2, 2, 2), torch.ones(3, 2, 2)]).shape == (6, 2, 2)


def test_weight_decay_leaves_the_transform() -> None:
    _, delta, _ = attached(6, 6)
    assert {group["weight_decay"] for group in delta.parameter_groups(1e-3, weight_decay=0.1)} == {0.0}
