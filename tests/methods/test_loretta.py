"""LoRETTA: tensor trains by hand and by TT-SVD, both variants against their formulas, and the published counts."""

import itertools
import math
from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb, frozen_output
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.tensor.tensors import (
    PUBLISHED,
    split,
    train_entries,
    train_modes,
)


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


def attached(method: str, out: int, inner: int, **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = linear(out, inner)
    delta = dw.attach(model, method, targets="0", **options)
    return model, delta, delta.tuners()[0]


def size(cores: Any) -> int:
    return sum(core.numel() for core in cores)


# ---------------------------------------------------------------------------- tensor trains


def test_hand_example() -> None:
    """Modes [2, 2], R = 1, cores (1, 2) and (3, 4)."""
    cores = [torch.tensor([1.0, 2.0]).view(1, 2, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1)]
    assert train_entries(cores).view(2, 2).tolist() == [[3.0, 4.0], [6.0, 8.0]]


def test_entries_are_products_of_the_slices() -> None:
    torch.manual_seed(0)
    cores = [torch.randn(1, 2, 3), torch.randn(3, 4, 2), torch.randn(2, 3, 1)]
    dense = train_entries(cores).view(2, 4, 3)
    for i, j, k in ((0, 0, 0), (1, 3, 2), (1, 0, 1), (0, 2, 2)):
        expected = cores[0][:, i] @ cores[1][:, j] @ cores[2][:, k]
        assert float(dense[i, j, k]) == pytest.approx(float(expected), rel=1e-5)


def decomposed(tensor: Tensor, modes: tuple[int, ...]) -> list[Tensor]:
    """TT-SVD with the full ranks."""
    cores, rest, rank = [], tensor.flatten(), 1
    for mode in modes[:-1]:
        U, S, V = torch.linalg.svd(rest.view(rank * mode, -1), full_matrices=False)
        cores.append(U.view(rank, mode, -1))
        rest, rank = S[:, None] * V, len(S)
    return [*cores, rest.view(rank, modes[-1], 1)]


@pytest.mark.parametrize("shape", [(12, 8), (16, 6), (7, 5)])
def test_full_ranks_hold_every_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    M, modes = torch.randn(shape), train_modes(*shape)
    cores = decomposed(M, modes)
    full = [min(math.prod(modes[:i]), math.prod(modes[i:])) for i in range(len(modes) + 1)]
    assert [(core.shape[0], core.shape[2]) for core in cores] == list(itertools.pairwise(full))
    torch.testing.assert_close(train_entries(cores).view(shape), M, rtol=1e-5, atol=1e-5)


def test_modes() -> None:
    """The published tables; the rule makes the same of 768; other sizes get balanced modes, primes too."""
    assert all(math.prod(modes) == math.prod(sizes) for sizes, modes in PUBLISHED.items())
    assert train_modes(64, 4096) == train_modes(4096, 64) == (16, 16, 16, 4, 4, 4)
    for width, modes in ((8, (8, 8, 12, 8)), (64, (8, 8, 12, 8, 8))):
        factors = split(768 * width, len(modes))
        assert factors[::2] + factors[1::2][::-1] == PUBLISHED[768, width] == modes
    assert train_modes(3072, 8) == (6, 8, 8, 8, 8)
    assert train_modes(31, 1) == (1, 31)
    assert split(320, 2) == (16, 20)
    assert split(768, 3) == (8, 8, 12)


def test_random_start_has_the_published_spread() -> None:
    """Entries of standard deviation (n_in + n_out)^-1/2, over many seeds: a train's entries are not independent."""
    entries = []
    for seed in range(20):
        tuner: Any = dw.attach(linear(256, 256), "loretta-rep[init=random]", targets="0", seed=seed).tuners()[0]
        entries += [train_entries(tuner.A), train_entries(tuner.B)]
    spread = torch.cat(entries).detach().square().mean().sqrt()
    assert float(spread) == pytest.approx((256 + 8) ** -0.5, rel=0.15)


# ---------------------------------------------------------------------------- rep


@pytest.mark.parametrize("shape", [(48, 32), (31, 17)])
def test_rep_is_a_low_rank_change_and_merges(shape: tuple[int, int]) -> None:
    model, delta, tuner = attached("loretta-rep", *shape, rank=4, alpha=8)
    x = torch.randn(6, shape[1])
    base = model(x)
    assert torch.equal(base, nn.functional.linear(x, model[0].weight, model[0].bias))
    disturb(delta, size=0.5)
    M_A = train_entries(tuner.A).view(shape[1], 4)
    M_B = train_entries(tuner.B).view(4, shape[0])
    change = 2 * (M_A @ M_B).T.detach()
    assert 1 <= int(torch.linalg.matrix_rank(change)) <= 4
    moved = model(x)
    torch.testing.assert_close(moved - base, x @ change.T, rtol=1e-4, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["loretta-rep", "loretta-adp"])
def test_start_is_the_base_and_random_is_not(method: str) -> None:
    base = frozen_output("bert")
    options = dw.registry()[method].small
    for init, same in (("zero", True), ("random", False)):
        model, inputs = zoo.ZOO["bert"]()
        dw.attach(model, method, init=init, **options)
        assert (difference(zoo.output_of("bert", model, inputs), base) <= 1e-6) is same


@pytest.mark.parametrize("method", ["loretta-rep", "loretta-adp"])
def test_every_core_gets_a_gradient_after_the_first_step(method: str) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, method, targets="attention.o,mlp.down", **dw.registry()[method].small)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    zoo.loss_of("bert", model, inputs).backward()
    tuner: Any = delta.tuners()[0]
    last = tuner.B if method == "loretta-rep" else tuner.U
    assert float(last[-1].grad.abs().max()) > 0
    assert float(last[0].grad.abs().max()) == 0
    optimizer.step()
    optimizer.zero_grad()
    zoo.loss_of("bert", model, inputs).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in delta.parameters())
    trained = {id(p) for p in delta.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


# ---------------------------------------------------------------------------- adp


def test_adp_against_the_formula_before_and_behind_a_layer() -> None:
    """An input adapter has the size of the input, an output adapter that of the output."""
    model, _ = zoo.ZOO["llama"]()
    delta = dw.attach(model, "loretta-adp[width=8]", targets="mlp.gate,mlp.up,mlp.down,attention.o,attention.q")
    disturb(delta, size=0.3)
    sides = {item.place.role: item.tuner.before for item in delta.attached}  # type: ignore[union-attr]
    assert sides == {"mlp.gate": True, "mlp.up": True, "attention.q": True, "mlp.down": False, "attention.o": False}
    assert {item.tuner.features for item in delta.attached} == {zoo.WIDTH}  # type: ignore[union-attr]
    for role in ("mlp.up", "mlp.down"):
        item = next(item for item in delta.attached if item.place.role == role)
        layer: Any = model.get_submodule(item.place.path)
        tuner: Any = item.tuner
        D = train_entries(tuner.D).view(zoo.WIDTH, 8)
        U = train_entries(tuner.U).view(8, zoo.WIDTH)
        x = torch.randn(2, 5, layer.in_features)
        z = x if tuner.before else nn.functional.linear(x, layer.weight)
        z = z + (torch.relu(z @ D + tuner.b_D) @ U + tuner.b_U)
        expected = nn.functional.linear(z, layer.weight) if tuner.before else z
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_adp_with_a_zero_up_projection_is_the_base_and_does_not_merge() -> None:
    model, delta, tuner = attached("loretta-adp", 12, 8, width=4, activation="identity")
    x = torch.randn(5, 8)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    disturb(delta)
    assert float((model(x) - base).detach().abs().max()) > 1e-3
    with torch.no_grad():
        for parameter in (*tuner.U, tuner.b_U):
            parameter.zero_()
    assert torch.equal(model(x), base)
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()


# ---------------------------------------------------------------------------- counts


def test_worked_counts() -> None:
    """768 x 64: 780, with biases 2,392; 768 x 8: 580; 4096 x 64: 1,100."""
    adapters: Any = dw.attach(zoo.real("bert-base"), "loretta-adp").tuners()
    assert len(adapters) == 24
    assert {(size(tuner.D), size(tuner.U)) for tuner in adapters} == {(780, 780)}
    assert {sum(p.numel() for p in tuner.parameters()) for tuner in adapters} == {2_392}
    products: Any = dw.attach(zoo.real("bert-base"), "loretta-rep", targets="attention.q").tuners()
    assert {(size(tuner.A), size(tuner.B)) for tuner in products} == {(580, 580)}
    large: Any = dw.attach(zoo.real("llama-7b"), "loretta-adp", targets="mlp.gate").tuners()[0]
    assert size(large.D) == size(large.U) == 1_100


def test_published_counts() -> None:
    """LLaMA-2-7B 0.88 M and DeBERTa-base 0.10 M, with the norms."""
    llama = dw.attach(zoo.real("llama-7b"), "loretta-adp", targets="mlp.gate,mlp.up,mlp.down", also="norm")
    assert llama.report().trainable == 96 * (2 * 1_100 + 64 + 4_096) + 65 * 4_096 == 876_800
    bert = dw.attach(zoo.real("bert-base"), "loretta-adp", also="norm").report().trainable
    assert bert == 24 * 2_392 + 25 * 1_536 == 95_808


def test_count_of_rep_on_real_shapes() -> None:
    """About 1 K a matrix, where LoRA has 12 K."""
    delta = dw.attach(zoo.real("roberta-base"), "loretta-rep", targets="attention.q,attention.v")
    assert delta.report().trainable == 24 * 1_160
    modes, R = PUBLISHED[1024, 8], 5
    one = modes[0] * R + sum(mode * R * R for mode in modes[1:-1]) + modes[-1] * R
    t5 = dw.attach(zoo.real("t5-large"), "loretta-rep", targets="attention.q,attention.v")
    assert t5.report().trainable == 96 * 2 * one == 96 * 1_280
