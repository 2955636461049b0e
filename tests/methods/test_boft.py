"""BOFT: orthogonal butterflies that connect every input, the published layer side by side, counts."""

from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.orthogonal.boft import paired, unpaired


def attached(spec: str, shape: tuple[int, int] = (48, 32), **options: Any) -> tuple[nn.Sequential, Any, dw.Delta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta.tuners()[0], delta


def dense(tuner: Any, inner: int = 32) -> Tensor:
    """R [in, in]: what W = I becomes, turned and without its scale."""
    scale, rows = tuner.scale, torch.eye(inner)
    assert torch.equal(scale, torch.ones_like(scale))
    padded = torch.cat([rows, rows.new_zeros(max(0, len(scale) - inner), inner)])
    return tuner.weight(padded)[:inner].detach().T


def test_pairs_of_the_butterfly() -> None:
    """b = 2: neighbours first, then inputs 2 apart in groups of 4, then 4 apart in groups of 8; b = 4 by halves."""
    x = torch.arange(8)
    assert paired(x, 2, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert paired(x, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert paired(x, 2, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert paired(x, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    for side, level in ((2, 1), (2, 2), (4, 1)):
        assert torch.equal(unpaired(paired(x, side, level), side, level), x)


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_orthogonal_for_every_number_of_factors(factors: int) -> None:
    """R^T R = I; two inputs meet where they stand in one group of b 2^(m-1): all of them for m = log2(in / b) + 1."""
    _, tuner, _ = attached("boft[block=4]", (32, 32), factors=factors)
    with torch.no_grad():
        tuner.blocks.normal_()
    R = dense(tuner)
    torch.testing.assert_close(R.T @ R, torch.eye(32), rtol=0, atol=1e-5)
    group = torch.arange(32) // (4 * 2 ** (factors - 1))
    assert torch.equal(R != 0, group[:, None] == group)


def test_the_product_of_the_levels() -> None:
    """R = R_m .. R_1 with R_i = P_i B_i P_i^T, P_i x the inputs put back from side by side."""
    _, tuner, _ = attached("boft[block=4,factors=3]", (32, 32))
    with torch.no_grad():
        tuner.blocks.normal_()
    R = torch.eye(32)
    for level, blocks in enumerate(tuner.rotations().detach()):
        P = paired(torch.eye(32), 4, level)
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    torch.testing.assert_close(dense(tuner), R, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_weight_and_leaves_the_bias(factors: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=bias))
    delta = dw.attach(model, "boft[block=4]", factors=factors, targets="0")
    disturb(delta, size=0.5)
    x, module, tuner = torch.randn(3, 5, 32), model[0], delta.tuners()[0]
    weight, own = tuner.weight(module.weight), module.bias
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, own), rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["boft[targets='0']+bitfit[targets='0']", "bitfit[targets='0']+boft[targets='0']"])
def test_a_bias_that_another_method_trains_is_not_scaled(spec: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    delta = dw.attach(model, spec)
    disturb(delta, size=0.5)
    x = torch.randn(3, 8)
    moved = model(x)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_with_one_factor_it_is_oft() -> None:
    _, tuner, _ = attached("boft[block=8]")
    with torch.no_grad():
        tuner.blocks.normal_()
    _, oft, _ = attached("oft[block=8]")
    skew = (tuner.blocks[0] - tuner.blocks[0].mT) / 2
    with torch.no_grad():
        oft.triangle.copy_(skew[:, *torch.triu_indices(8, 8, 1)])
    weight = torch.randn(48, 32)
    torch.testing.assert_close(tuner.weight(weight), oft.weight(weight))


def test_starts_as_the_base() -> None:
    model, _, delta = attached("boft[factors=3]")
    x = torch.randn(4, 32)
    module: Any = model[0]
    torch.testing.assert_close(model(x), nn.functional.linear(x, module.weight, module.bias), rtol=0, atol=1e-6)
    model(x).square().sum().backward()
    assert module.weight.grad is None
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in delta.parameters() if parameter.grad is not None)
    assert delta.parameter_groups(1e-3, weight_decay=0.1)[0]["weight_decay"] == 0


def test_refusals() -> None:
    with pytest.raises(dw.UserError, match="the 32 inputs of '0' cannot be cut into blocks for 7 butterfly factors"):
        attached("boft[factors=7]")
    with pytest.raises(dw.UserError, match="block and blocks say the same thing"):
        attached("boft[block=4,blocks=2]")
    assert attached("boft[block=8,factors=5]")[1].side == 2  # 32 / 8 blocks are too few for five factors


def test_equals_peft() -> None:
    """One factor: without its compiled extension peft has no more."""
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16), torch.randn(3, 24)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    theirs: Any = peft.get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    with torch.no_grad():
        wrapped.boft_R["default"].normal_(std=0.3)
        wrapped.boft_s["default"].add_(torch.randn(16, 1), alpha=0.3)
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    delta = dw.attach(model, "boft[block=4]", targets="0")
    assert (expected - model(x)).abs().max() > 0.1
    tuner: Any = delta.tuners()[0]
    with torch.no_grad():
        tuner.blocks.copy_(wrapped.boft_R["default"])
        tuner.scale.copy_(wrapped.boft_s["default"].flatten())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factors", "expected"), [(1, 32 * 4 + 48), (3, 3 * 32 * 4 + 48)])
def test_counts(factors: int, expected: int) -> None:
    assert attached("boft", factors=factors)[2].report().trainable == expected


def test_count_on_roberta() -> None:
    """RoBERTa-base, six linears, b = 4, m = 2: 2 * 4 in + out for each."""
    delta = dw.attach(zoo.real("roberta-base"), "boft[factors=2]")
    assert delta.report().trainable == 12 * (8 * (5 * 768 + 3072) + 5 * 768 + 3072)
