"""Intrinsic SAID: the transform against its matrix, its adjoint and its norm, the count, what is stored."""

import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.forms import Tuner
from deltaworks.methods.reparametrized.transform.said import Fastfood, hadamard, walsh_hadamard


def fastfood(inner: int, size: int, seed: int = 0) -> Fastfood:
    return Fastfood(inner, size, torch.Generator().manual_seed(seed), torch.device("cpu"))


def said(model: nn.Module, **options: float) -> dw.Delta:
    return dw.attach(model, "said", **{"dimension": 300, **options})


def test_hadamard_by_hand() -> None:
    assert hadamard(2, torch.ones(1)).tolist() == [[1, 1], [1, -1]]
    assert walsh_hadamard(torch.tensor([3.0, 1.0])).tolist() == [4.0, 2.0]
    assert walsh_hadamard(torch.tensor([7.0])).tolist() == [7.0]


@pytest.mark.parametrize("length", [8, 32, 64, 2048])
def test_fast_transform_is_the_matrix_and_its_own_inverse_up_to_the_length(length: int) -> None:
    H = hadamard(length, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(H @ H, length * torch.eye(length, dtype=torch.float64))
    x = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(walsh_hadamard(x), H @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("inner", "size"), [(20, 100), (20, 64), (200, 100), (5, 1), (7, 3)])
def test_linear_with_its_true_adjoint(inner: int, size: int) -> None:
    transform, generator = fastfood(inner, size), torch.Generator().manual_seed(1)
    a, b = (torch.randn(inner, generator=generator, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(transform(a + b), transform(a) + transform(b), rtol=1e-4, atol=1e-5)
    g = torch.randn(size, generator=generator)
    (adjoint,) = torch.autograd.grad(transform(a), a, g)
    assert float(transform(a).detach() @ g) == pytest.approx(float(a.detach() @ adjoint), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(adjoint, matrix(transform, inner).T @ g, rtol=1e-4, atol=1e-5)


def matrix(transform: Fastfood, inner: int) -> Tensor:
    """P as a matrix [D, d']."""
    return torch.stack([transform(unit) for unit in torch.eye(inner)], dim=1)


def test_a_seed_decides_everything() -> None:
    v = torch.randn(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fastfood(20, 100)(v), fastfood(20, 100)(v))
    assert float((fastfood(20, 100)(v) - fastfood(20, 100, seed=1)(v)).norm()) > 1.0


def test_norm_is_kept_on_average() -> None:
    """D = 1000 of L = 1024: the mean of ||P v||^2 / ||v||^2 is 1 within 5 %."""
    v = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ratios = [float(fastfood(50, 1000, seed)(v).square().sum() / v.square().sum()) for seed in range(60)]
    assert sum(ratios) / 60 == pytest.approx(1.0, rel=0.05)


def test_gradients_at_the_start() -> None:
    model, inputs = zoo.ZOO["bert"]()
    base = zoo.output_of("bert", model, inputs).detach()
    delta = said(model)
    assert torch.equal(zoo.output_of("bert", model, inputs), base)
    zoo.loss_of("bert", model, inputs).backward()
    for name, parameter in delta.named_parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).all() if name.endswith(".v") else (parameter.grad == 0).all()), name


def test_updates_stay_in_a_subspace() -> None:
    """The changes of all weights together span d' dimensions, and no more than d with the scales."""
    model, _ = zoo.ZOO["mlp"]()
    delta = dw.attach(model, "said", dimension=10)
    v = delta.parameters()[0]
    assert v.shape == (10 - 4,)  # two layers before the head, with weight and bias each
    changes = []
    for trial in range(20):
        disturb(delta, seed=trial)
        changes.append(torch.cat([(t.tensor(n, p) - p).flatten() for t, n, p in tensors(model, delta)]).detach())
    assert torch.linalg.matrix_rank(torch.stack(changes), rtol=1e-4) > 6  # the scales turn it
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            if "scales" in name:
                parameter.fill_(1.0)
    units = []
    for unit in torch.eye(6):
        v.data.copy_(unit)
        units.append(torch.cat([(t.tensor(n, p) - p).flatten() for t, n, p in tensors(model, delta)]).detach())
    assert torch.linalg.matrix_rank(torch.stack(units)) == 6


def tensors(model: nn.Module, delta: dw.Delta) -> list[tuple[Tuner, str, Tensor]]:
    return [
        (item.tuner, name, parameter)
        for item in delta.attached
        for name, parameter in model.get_submodule(item.place.path)._parameters.items()
        if parameter is not None
    ]


@pytest.mark.parametrize(("name", "head"), [("bert", 2), ("gpt2", 0), ("t5", 0)])
def test_stored_bytes_and_count(name: str, head: int) -> None:
    """d numbers of four bytes: v and one scale for each tensor, tied ones once."""
    model, _ = zoo.ZOO[name]()
    parameters = len(list(model.parameters()))
    delta = said(model)
    sizes = [parameter.numel() for parameter in delta.parameters()]
    assert sum(sizes) == 300
    assert sorted(sizes) == [1] * (parameters - head) + [300 - parameters + head]
    assert sum(tensor.numel() * tensor.element_size() for tensor in delta.tensors().values()) == 1200
    delta.detach()
    assert sum(parameter.numel() for parameter in said(model, scales=False).parameters()) == 300


def test_too_few_dimensions() -> None:
    model, _ = zoo.ZOO["bert"]()
    with pytest.raises(dw.UserError, match="scales of 39 tensors leave nothing of dimension=30"):
        said(model, dimension=30)


@pytest.mark.parametrize(
    "name", ["t5-base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5-large", "t5-3b", "t5-11b"))]
)
def test_published_count(name: str) -> None:
    """20,000 for every size: 0.009 % of T5-base."""
    model = zoo.real(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert dw.attach(model, "said").report().trainable == 20_000
    if name == "t5-base":
        assert 20_000 / total == pytest.approx(0.00009, rel=0.01)
