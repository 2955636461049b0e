"""FourierFT: one coefficient by hand, huggingface/peft side by side, counts and what the seed decides."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.transform.fourierft import places

QV = "attention.q,attention.v"


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


def change(tuner: Any, out: int, inner: int) -> Tensor:
    return tuner.weight(torch.zeros(out, inner)).detach()


def put(tuner: Any, values: dict[tuple[int, int], float]) -> None:
    """The spectrum with these coefficients at (row, column), whatever the seed drew."""
    inner = tuner.shape[1]
    with torch.no_grad():
        tuner.entries.copy_(torch.tensor([row * inner + column for row, column in values]))
        tuner.spectrum.copy_(torch.tensor(list(values.values())))


def test_the_constant_coefficient_alone_is_a_constant_change() -> None:
    """S[0, 0] = c: alpha c / (out in) everywhere."""
    tuner = dw.attach(linear(6, 4), "fourierft", targets="0", frequencies=1, alpha=150).tuners()[0]
    put(tuner, {(0, 0): 0.4})
    torch.testing.assert_close(change(tuner, 6, 4), torch.full((6, 4), 150 * 0.4 / 24))


def test_one_coefficient_is_a_cosine() -> None:
    """S[k, m] = c: entry (o, j) is alpha c cos(2 pi (k o / out + m j / in)) / (out in)."""
    tuner = dw.attach(linear(6, 4), "fourierft", targets="0", frequencies=2, alpha=3).tuners()[0]
    put(tuner, {(2, 3): 5.0, (1, 0): 2.0})
    expected = [
        [
            3 / 24 * (5 * math.cos(2 * math.pi * (2 * o / 6 + 3 * j / 4)) + 2 * math.cos(2 * math.pi * o / 6))
            for j in range(4)
        ]
        for o in range(6)
    ]
    torch.testing.assert_close(change(tuner, 6, 4), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_published_start_has_the_expected_spread() -> None:
    """n = 1000, alpha = 150, 768 x 768: alpha sqrt(n / 2) / (768 768) = 5.7e-3."""
    model = linear(768, 768)
    tuner = dw.attach(model, "fourierft[init=normal]", targets="0").tuners()[0]
    assert float(change(tuner, 768, 768).std()) == pytest.approx(150 * math.sqrt(500) / 768**2, rel=0.1)
    assert 150 * math.sqrt(500) / 768**2 == pytest.approx(5.7e-3, rel=0.01)


@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_start_is_the_base_or_says_that_it_is_not(init: str) -> None:
    model, x = linear(48, 32), torch.randn(5, 32)
    base = model(x)
    dw.attach(model, "fourierft", targets="0", frequencies=64, init=init)
    assert (float((model(x) - base).detach().abs().max()) <= 1e-6) is (init == "zeros")


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (31, 17)])
def test_equals_peft_with_its_seed(shape: tuple[int, int]) -> None:
    """Seed 777 draws the places of huggingface/peft: with its coefficients the outputs are equal."""
    out, inner = shape
    plain = linear(out, inner)
    config = peft.FourierFTConfig(n_frequency=40, scaling=150.0, target_modules=["0"], random_loc_seed=777)
    theirs: Any = peft.get_peft_model(plain, config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    x = torch.randn(3, inner)
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    tuner: Any = dw.attach(model, "fourierft", targets="0", frequencies=40, seed=777).tuners()[0]
    rows, columns = wrapped.indices["default"]
    assert torch.equal(tuner.entries, rows * inner + columns)
    with torch.no_grad():
        tuner.spectrum.copy_(wrapped.fourierft_spectrum["default"])
    assert float((model(x) - nn.functional.linear(x, wrapped.base_layer.weight)).abs().max()) > 0.1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_change_is_linear_in_the_coefficients_and_merges_exactly() -> None:
    model, x = linear(48, 32), torch.randn(5, 32)
    delta = dw.attach(model, "fourierft", targets="0", frequencies=64)
    tuner: Any = delta.tuners()[0]
    disturb(delta, size=1.0)
    one = change(tuner, 48, 32)
    with torch.no_grad():
        tuner.spectrum.mul_(3)
    torch.testing.assert_close(change(tuner, 48, 32), 3 * one)
    moved = model(x)
    # an identity matrix pushed through the layer reads its weight
    read = model(torch.eye(32)) - model[0].bias - model[0].weight.T
    torch.testing.assert_close(read, 3 * one.T, rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_places_are_the_seeds_and_equal_for_weights_of_one_shape() -> None:
    model, _ = zoo.ZOO["bert"]()
    tuners: Any = dw.attach(model, "fourierft", targets=QV, frequencies=64).tuners()
    assert len({tuner.entries.data_ptr() for tuner in tuners}) == 1
    assert len(set(tuners[0].entries.tolist())) == 64
    again: Any = dw.attach(model, "fourierft", targets=QV, frequencies=64, name="again").tuners()[0]
    other: Any = dw.attach(model, "fourierft", targets=QV, frequencies=64, name="other", seed=1).tuners()[0]
    assert torch.equal(again.entries, tuners[0].entries)
    assert not torch.equal(other.entries, tuners[0].entries)
    assert places(10, 10, 3).sort().values.tolist() == list(range(10))


def test_a_file_holds_the_coefficients_alone_whatever_the_global_seed(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "fourierft", frequencies=64, seed=5)
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    assert {tuple(tensor.shape) for tensor in delta.tensors().values()} == {(64,)}
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    torch.manual_seed(999)
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), moved)


def test_every_coefficient_gets_a_gradient_at_the_first_step() -> None:
    model = linear(48, 32)
    delta = dw.attach(model, "fourierft", targets="0", frequencies=200)
    model(torch.randn(7, 32)).square().sum().backward()
    (spectrum,) = delta.parameters()
    assert spectrum.grad is not None
    assert int((spectrum.grad == 0).sum()) == 0
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("model", "expected"), [("roberta-base", 24_000), ("bert-large", 48_000), ("llama-7b", 64_000)]
)
def test_published_counts(model: str, expected: int) -> None:
    """RoBERTa-large has the shapes of BERT-large."""
    assert dw.attach(zoo.real(model), "fourierft", targets=QV).report().trainable == expected


def test_more_coefficients_than_entries_is_an_error() -> None:
    with pytest.raises(dw.UserError, match=r"frequencies=1000 is more than the 24 entries of '0': use at most 24"):
        dw.attach(linear(6, 4), "fourierft", targets="0")
    assert dw.attach(linear(6, 4), "fourierft", targets="0", frequencies=24).report().trainable == 24
