"""WaRA: the transforms against PyWavelets, every mode against its formula on real transforms, counts and refusals."""

from pathlib import Path
from typing import Any

import pytest
import pywt
import torch
import zoo
from conformance import difference, disturb, frozen_output
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.transform.wavelets import (
    WAVELETS,
    analysis,
    bands,
    forward,
    inverse,
    synthesis,
    weighted,
)

# wrapping a filter around what is shorter than it is the point of some tests
pytestmark = pytest.mark.filterwarnings("ignore:Level value of")
every_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


def attached(out: int, inner: int, **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = linear(out, inner)
    delta = dw.attach(model, "wara", targets="0", **options)
    return model, delta, delta.tuners()[0]


def matrix(size: int, wavelet: str, levels: int = 1) -> Tensor:
    """H [size, size] in float64, made by PyWavelets: its columns are the transforms of the unit vectors."""
    eye = torch.eye(size, dtype=torch.float64).numpy()
    found = pywt.wavedec(eye, wavelet, mode="periodization", level=levels, axis=0)
    return torch.cat([torch.from_numpy(band) for band in found])


def dwt2(x: Tensor, wavelet: str = "haar") -> Tensor:
    """Bands [2, 2, rows / 2, columns / 2] of the last two axes: first axis low or high, second axis low or high."""
    halves = (half.mT for half in analysis(x.mT, wavelet))
    return torch.stack([torch.stack(analysis(half, wavelet)) for half in halves])


def idwt2(bands: Tensor, wavelet: str = "haar") -> Tensor:
    low, high = (synthesis(band[0], band[1], wavelet).mT for band in bands)
    return synthesis(low, high, wavelet).mT


# ---------------------------------------------------------------------------- the transforms


def test_haar_by_hand() -> None:
    """[[1, 2], [3, 4]]: LL 5, first axis low and second high -1, first high and second low -2, HH 0."""
    found = dwt2(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    torch.testing.assert_close(found[..., 0, 0], torch.tensor([[5.0, -1.0], [-2.0, 0.0]]), atol=1e-6, rtol=0)


@every_wavelet
def test_transforms_come_back_and_keep_the_energy(wavelet: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(3, 12, 10)
    found = dwt2(X, wavelet)
    assert float((idwt2(found, wavelet) - X).abs().max()) < 1e-6 * 5
    assert float(found.norm()) == pytest.approx(float(X.norm()), rel=1e-5)
    for levels in (1, 2, 3):
        coefficients = forward(X, wavelet, levels)
        assert coefficients.shape[-1] == sum(bands(10, levels)) == -(-10 // 2**levels) * 2**levels
        assert difference(inverse(coefficients, wavelet, levels)[..., :10], X) < 2e-6


@every_wavelet
@pytest.mark.parametrize(("size", "levels"), [(16, 1), (16, 2), (24, 3), (6, 1), (4, 2), (2, 1)])
def test_transforms_equal_pywavelets(wavelet: str, size: int, levels: int) -> None:
    """Also where the filter is longer than what it transforms."""
    assert pytest.approx(pywt.Wavelet(wavelet).rec_lo, abs=1e-11) == WAVELETS[wavelet]
    H = matrix(size, wavelet, levels)
    torch.testing.assert_close(H @ H.T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)
    x = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(forward(x, wavelet, levels), x @ H.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(inverse(x, wavelet, levels), x @ H, atol=1e-10, rtol=0)


def test_weighted_bands() -> None:
    x = torch.tensor([1.0, 3.0, 5.0])  # padded: means 2, 2.5 of the pairs; differences -1, 2.5
    expected = torch.tensor([2.0 - 3.0, 2.0 + 3.0, 2.5 + 7.5])
    torch.testing.assert_close(weighted(x, torch.tensor([1.0, 3.0]), "haar"), expected)


# ---------------------------------------------------------------------------- feature and shared


@every_wavelet
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("shape", [(48, 32), (14, 19)])
def test_feature_mode_is_the_block_diagonal_formula(shape: tuple[int, int], levels: int, wavelet: str) -> None:
    """On padded sizes with PyWavelets' matrices; merged equals unmerged."""
    model, delta, tuner = attached(*shape, rank=3, alpha=6, wavelet=wavelet, levels=levels)
    x = torch.randn(5, shape[1])
    base = model(x)
    assert torch.equal(base, nn.functional.linear(x, model[0].weight, model[0].bias))
    disturb(delta, size=0.3)
    out, inner = (matrix(sum(bands(size, levels)), wavelet, levels) for size in shape)
    blocks = torch.block_diag(*((B @ A).detach().double() for A, B in zip(tuner.A, tuner.B, strict=True)))
    change = 2 * (out.T @ blocks @ inner)[: shape[0], : shape[1]]
    moved = model(x)
    torch.testing.assert_close((moved - base).double(), x.double() @ change.T, rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_shared_mode_through_real_transforms_is_a_kronecker_product() -> None:
    """C'_b = B A C_b on all four bands of X [features, tokens]; rank 2 r."""
    model, delta, tuner = attached(12, 8, rank=2, mode="shared")
    disturb(delta, size=0.5)
    X = torch.randn(3, 8, 6)
    product = (tuner.B[0] @ tuner.A[0]).detach()
    through = idwt2(product @ dwt2(X))
    x = X.mT
    change = torch.kron(product, torch.eye(2))
    torch.testing.assert_close(through.mT, x @ change.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x) - x @ model[0].weight.T - model[0].bias, x @ change.T, rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(tuner.weight(torch.zeros(12, 8)))) == 4


def test_gradients_reach_every_pair() -> None:
    model, delta, tuner = attached(12, 8, rank=2, levels=2)
    assert [tuple(A.shape) for A in tuner.A] == [(2, 2), (2, 2), (2, 4)]
    model(torch.randn(5, 8)).square().sum().backward()
    assert all(float(B.grad.abs().min()) > 0 for B in tuner.B)
    disturb(delta)
    model(torch.randn(5, 8)).square().sum().backward()
    assert all(float(A.grad.abs().min()) > 0 for A in tuner.A)


# ---------------------------------------------------------------------------- token and spatial


def gained(tuner: Any, gains: list[float], size: float = 0.5) -> None:
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(size * torch.randn_like(parameter))
        tuner.gains.copy_(torch.tensor(gains).view(2, 2))


@every_wavelet
@pytest.mark.parametrize("tokens", [6, 5])
def test_token_mode_is_the_figure(wavelet: str, tokens: int) -> None:
    """IDWT2 of g_c B A C_c with the bands of [features, tokens]; an odd number of tokens is padded with a zero."""
    gains = [1.0, 0.5, 0.3, 2.0]
    model, _, tuner = attached(12, 8, rank=2, mode="token", wavelet=wavelet)
    gained(tuner, gains)
    x = torch.randn(3, tokens, 8)
    X = nn.functional.pad(x.mT, (0, tokens % 2))
    product = (tuner.B[0] @ tuner.A[0]).detach()
    moved = idwt2(torch.tensor(gains).view(2, 2, 1, 1, 1) * (product @ dwt2(X, wavelet)), wavelet)[..., :tokens].mT
    torch.testing.assert_close(model(x) - x @ model[0].weight.T - model[0].bias, moved, rtol=1e-5, atol=1e-5)


def test_token_mode_with_equal_gains_is_shared_mode() -> None:
    model, _, token = attached(12, 8, rank=2, mode="token")
    gained(token, [1.0, 1.0, 1.0, 1.0])
    x = torch.randn(3, 6, 8)
    moved = model(x)
    shared: Any = dw.attach(model, "wara[mode=shared,rank=2]", targets="0", name="shared").tuners()[0]
    dw.switch(model, "shared")
    with torch.no_grad():
        shared.A[0].copy_(token.A[0])
        shared.B[0].copy_(token.B[0])
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_token_mode_with_other_gains_is_no_weight_and_does_not_merge() -> None:
    """A change of one token reaches its neighbour, so no weight that acts on single tokens can hold it."""
    model, delta, tuner = attached(12, 8, rank=2, mode="token")
    x = torch.randn(1, 6, 8)
    base = model(x)
    gained(tuner, [1.0, 0.5, 0.3, 2.0])
    other = x.clone()
    other[:, 1] += 1.0
    touched = (model(other) - model(x)).detach().abs().amax(-1)[0] > 1e-4
    assert touched.tolist() == [True, True, False, False, False, False]
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()
    with delta.disabled():
        assert torch.equal(model(x), base)
    with pytest.raises(dw.UserError, match=r"need inputs \[batch, tokens, features\]"):
        model(x[0])


def test_causality() -> None:
    """In a decoder a later token changes nothing in feature mode, and token mode is refused."""
    model, inputs = zoo.ZOO["llama"]()
    delta = dw.attach(model, "wara[rank=4]")
    disturb(delta)
    ids = inputs["input_ids"][:1]
    before = model(input_ids=ids).logits
    ids = ids.clone()
    ids[0, 6] += 1
    after = model(input_ids=ids).logits
    assert torch.equal(after[:, :6], before[:, :6])
    assert difference(after[:, 6:], before[:, 6:]) > 1e-3
    with pytest.raises(dw.UserError, match=r"mode=token does not fit .* a token would see a later one"):
        dw.attach(zoo.ZOO["llama"]()[0], "wara[mode=token]")


@pytest.mark.parametrize(("tokens", "side"), [(17, 4), (9, 3), (11, 3)])
def test_spatial_mode_transforms_the_grid_of_patches(tokens: int, side: int) -> None:
    """A class token (or two) gets the plain low-rank change; 3 x 3 patches are padded to 4 x 4."""
    gains = [1.0, 0.5, 0.3, 2.0]
    first = tokens - side**2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Linear(8, 12))
    delta = dw.attach(model, "wara[mode=spatial,rank=2]", targets="1")
    tuner: Any = delta.tuners()[0]
    layer = model[1]
    x = torch.randn(2, tokens, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    gained(tuner, gains)
    product = (tuner.B[0] @ tuner.A[0]).detach()
    grid = (x[:, first:] @ product.T).view(2, side, side, 12).permute(0, 3, 1, 2)
    grid = nn.functional.pad(grid, (0, side % 2, 0, side % 2))
    moved = idwt2(torch.tensor(gains).view(2, 2, 1, 1, 1, 1) * dwt2(grid))[..., :side, :side]
    expected = torch.cat([x[:, :first] @ product.T, moved.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    found = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "mode"), [("bert", "token"), ("vit", "token"), ("vit", "spatial")])
def test_modes_over_tokens_in_whole_models(family: str, mode: str, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO[family]()
    delta = dw.attach(model, "wara", rank=4, mode=mode)
    assert difference(zoo.output_of(family, model, inputs), frozen_output(family)) < 1e-5
    disturb(delta)
    moved = zoo.output_of(family, model, inputs)
    zoo.loss_of(family, model, inputs).backward()
    # of the last block only the class token reaches the output, and it has no gains in spatial mode
    first = [item.tuner for item in delta.attached if item.place.block == 0]
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for t in first for p in t.parameters())
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO[family]()
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of(family, fresh, inputs), moved)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(zoo.output_of(family, compiled, inputs), moved) < 1e-5


def test_gains_do_not_decay() -> None:
    _, delta, _ = attached(12, 8, rank=2, mode="token")
    assert {group["weight_decay"] for group in delta.parameter_groups(1e-3, weight_decay=0.1)} == {0.0}


# ---------------------------------------------------------------------------- Tiny-WaRA


@pytest.mark.parametrize("mode", ["feature", "shared"])
@pytest.mark.parametrize("basis", ["svd", "svd-diagonal"])
def test_tiny_moves_the_weight_along_the_singular_vectors_of_its_bands(mode: str, basis: str) -> None:
    """R = c I on a band adds c to each of its first r singular values: U (S + c) V^T."""
    model, _, tuner = attached(12, 8, rank=3, mode=mode, basis=basis, wavelet="db2")
    x = torch.randn(4, 8)
    base = model(x)
    assert torch.equal(base, nn.functional.linear(x, model[0].weight, model[0].bias))
    with torch.no_grad():
        for R in tuner.R:
            R.copy_(2 * torch.eye(3) if basis == "svd" else 2 * torch.ones(3))
    out, inner = matrix(12, "db2"), matrix(8, "db2")
    before = out @ model[0].weight.detach().double() @ inner.T
    after = out @ tuner.weight(model[0].weight).detach().double() @ inner.T
    second = after[6:, 4:] - before[6:, 4:]
    for rows, columns in ((slice(0, 6), slice(0, 4)), (slice(6, 12), slice(4, 8))):
        old, new = torch.linalg.svdvals(before[rows, columns]), torch.linalg.svdvals(after[rows, columns])
        if mode == "feature" or rows.start == 0:
            torch.testing.assert_close(new[:3], old[:3] + 2, rtol=1e-5, atol=1e-5)
            assert float(new[3]) == pytest.approx(float(old[3]), abs=1e-5)
    if mode == "shared":
        torch.testing.assert_close(second, after[:6, :4] - before[:6, :4], rtol=1e-5, atol=1e-5)
    assert float((after - before)[:6, 4:].abs().max()) < 1e-5, "the bands do not mix"


def test_tiny_stores_the_middle_alone_and_makes_its_basis_again(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "wara[rank=4,basis=svd]")
    disturb(delta, size=0.5)
    moved = zoo.output_of("bert", model, inputs)
    assert difference(moved, frozen_output("bert")) > 1e-3
    assert {tuple(tensor.shape) for tensor in delta.tensors().values()} == {(4, 4)}
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    torch.manual_seed(999)
    dw.load(fresh, tmp_path)
    assert difference(zoo.output_of("bert", fresh, inputs), moved) < 1e-6


# ---------------------------------------------------------------------------- counts and mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "shared"}, 6_144),
        ({"mode": "feature"}, 12_288),
        ({"mode": "feature", "levels": 3}, 12_288),
        ({"mode": "token"}, 6_144 + 4),
        ({"mode": "feature", "basis": "svd"}, 2 * 64),
        ({"mode": "shared", "basis": "svd"}, 64),
        ({"mode": "shared", "basis": "svd-diagonal"}, 8),
    ],
)
def test_count_of_one_square_matrix(options: dict[str, Any], expected: int) -> None:
    delta = dw.attach(zoo.real("bert-base"), "wara", targets="attention.q", **options)
    assert {sum(p.numel() for p in tuner.parameters()) for tuner in delta.tuners()} == {expected}


def test_count_on_real_shapes() -> None:
    """T5-large, query and value of 72 attentions: 144 matrices of 1024 x 1024, half of LoRA's in shared mode."""
    targets = "attention.q,attention.v,cross_attention.q,cross_attention.v"
    lora = dw.attach(zoo.real("t5-large"), "lora", targets=targets).report().trainable
    assert lora == 144 * 16_384
    assert dw.attach(zoo.real("t5-large"), "wara", targets=targets).report().trainable == lora
    assert dw.attach(zoo.real("t5-large"), "wara[mode=shared]", targets=targets).report().trainable == lora // 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 5}, "rank 5 is larger than the narrowest band of '0' allows: use at most 4"),
        ({"rank": 1, "mode": "shared", "levels": 2}, "levels=2 needs mode=feature"),
        ({"rank": 1, "mode": "spatial"}, "mode=spatial needs image patches, and Sequential has none"),
    ],
)
def test_mistakes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(dw.UserError, match=sentence):
        attached(12, 8, **options)
