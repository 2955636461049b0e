"""MiSS and Bat: hand-computed blocks, the published layers side by side, published counts."""

from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of


def layer(spec: str, weight: Tensor, bias: bool = False, **options: Any) -> tuple[nn.Sequential, Any, dw.Delta]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = nn.Sequential(linear)
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta.tuners()[0], delta


def change(delta: dw.Delta) -> Tensor:
    found = delta.change(delta.attached[0])
    assert found is not None
    return found.float()


def fill(parameter: nn.Parameter, values: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


def test_miss_by_hand() -> None:
    """in 4, out 2, r 2, D = [[1, 0], [0, 2]], x = [1, 2, 3, 4]: S = [4, 6], S D = [4, 12]."""
    model, tuner, delta = layer("miss[rank=2]", torch.zeros(2, 4))
    fill(tuner.block, [[1.0, 0.0], [0.0, 2.0]])
    assert model(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[4.0, 12.0]]
    assert change(delta).tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0]]


def test_the_tail_takes_the_first_rows_of_the_block() -> None:
    """in 5, r 2: the fifth column of the change is row 0 of D."""
    torch.manual_seed(0)
    model, tuner, delta = layer("miss[rank=2]", torch.randn(3, 5), bias=True)
    disturb(delta)
    assert torch.equal(change(delta)[:, 4], tuner.block[0])
    x = torch.randn(4, 5)
    expected = model(x)
    delta.merge()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_of_outputs_by_hand() -> None:
    """D [2, 3] over 5 outputs: the first row for outputs 0 to 2, the second one for 3 and 4."""
    _, tuner, delta = layer("miss[rank=2,blocks=outputs]", torch.zeros(5, 3))
    fill(tuner.block, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert change(delta).tolist() == [[1.0, 2.0, 3.0]] * 3 + [[4.0, 5.0, 6.0]] * 2


def test_mini() -> None:
    """With m = out it is MiSS; with m = 1 all rows of the change are the same; m = 2 of 6 outputs repeats thrice."""
    torch.manual_seed(0)
    values = torch.randn(3, 6)
    _, whole, one = layer("miss[rank=3]", torch.zeros(6, 7))
    _, same, two = layer("miss[rank=3,width=6]", torch.zeros(6, 7))
    for tuner in (whole, same):
        fill(tuner.block, values.tolist())
    assert torch.equal(change(one), change(two))
    _, narrow, delta = layer("miss[rank=3,width=1]", torch.zeros(6, 7))
    disturb(delta)
    assert narrow.block.shape == (3, 1)
    assert torch.equal(change(delta), change(delta)[:1].expand(6, 7))
    _, pair, delta = layer("miss[rank=3,width=2]", torch.zeros(6, 7))
    disturb(delta)
    assert torch.equal(change(delta), change(delta)[:2].repeat(3, 1))
    assert pair.block.numel() == 6


@pytest.mark.parametrize("blocks", ["inputs", "outputs"])
def test_rank_of_the_change(blocks: str) -> None:
    torch.manual_seed(0)
    _, _, delta = layer("miss[rank=3]", torch.randn(8, 12), blocks=blocks)
    disturb(delta)
    assert rank_of(change(delta)) == 3
    _, _, delta = layer("bat[rank=4]", torch.randn(8, 12), blocks=blocks)
    disturb(delta)
    assert rank_of(change(delta)) == 8


def test_bat_by_hand() -> None:
    """One block W = [[1, 2], [3, 4]], D = I / 2: W D + D = [[1, 1], [1.5, 2.5]]."""
    for blocks in ("inputs", "outputs"):
        _, tuner, delta = layer("bat[rank=2]", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), blocks=blocks)
        fill(tuner.blocks, [[[0.5, 0.0], [0.0, 0.5]]])
        assert change(delta).tolist() == [[1.0, 1.0], [1.5, 2.5]]


@pytest.mark.parametrize("blocks", ["inputs", "outputs"])
def test_bat_changes_each_block_by_its_own_matrix(blocks: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    _, tuner, delta = layer("bat[rank=2]", weight, blocks=blocks)
    disturb(delta)
    D, moved = tuner.blocks.detach(), change(delta)
    assert D.shape == ((3, 2, 2) if blocks == "inputs" else (2, 2, 2))
    for a in range(2):
        for b in range(3):
            cut, own = weight[2 * a : 2 * a + 2, 2 * b : 2 * b + 2], D[b if blocks == "inputs" else a]
            found = moved[2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
            torch.testing.assert_close(found, cut @ own + own, rtol=1e-5, atol=1e-6)


def test_bat_can_be_undone_with_the_inverse() -> None:
    """W = (W' - D) (I + D)^-1 by blocks, within 1e-4 for |D| <= 0.01; the library keeps the weight itself."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8)
    model, tuner, delta = layer("bat[rank=8]", weight)
    with torch.no_grad():
        tuner.blocks.uniform_(-0.01, 0.01)
    delta.merge()
    D = tuner.blocks[0].detach()
    module: Any = model[0]
    back = (module.weight - D) @ torch.linalg.inv(torch.eye(8) + D)
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-4)
    assert not torch.equal(module.weight, weight)
    delta.unmerge()
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("spec", ["miss[rank=4]", "miss[rank=4,width=2]", "miss[rank=4,blocks=outputs]", "bat[rank=4]"])
def test_starts_bitwise_as_the_base_and_trains_the_block_alone(spec: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 12), torch.randn(2, 5, 12)
    model, tuner, delta = layer(spec, weight)
    assert torch.equal(model(x), x @ weight.T)
    model(x).square().sum().backward()
    assert [float(p.grad.abs().max()) > 0 for p in delta.parameters() if p.grad is not None] == [True]
    module: Any = model[0]
    assert module.weight.grad is None
    assert len(list(tuner.parameters())) == 1


def test_the_sum_of_slices_equals_the_product() -> None:
    """The fast form against A and B, with a width that does not divide the inputs."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 10), torch.randn(3, 4, 10)
    model, tuner, delta = layer("miss[rank=4,width=4]", weight)
    disturb(delta)
    A, B, scale = tuner.factors()
    torch.testing.assert_close(model(x), x @ (weight + scale * B @ A).T, rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_input_while_training_only() -> None:
    for blocks in ("inputs", "outputs"):
        model, _, delta = layer("miss[rank=2,dropout=0.5]", torch.zeros(4, 6), blocks=blocks)
        disturb(delta)
        x = torch.randn(8, 6)
        assert torch.equal(model.eval()(x), model(x))
        assert not torch.equal(model.train()(x), model(x))


def test_equals_peft() -> None:
    """huggingface/peft with the same blocks gives the same outputs: MiSS, mini, and Bat."""
    for init, options in ((True, {}), ("mini", {"width": 4}), ("bat", {})):
        torch.manual_seed(0)
        linear, x = nn.Linear(12, 8), torch.randn(3, 12)
        config = peft.MissConfig(r=4, mini_r=4, init_weights=init, target_modules=["0"])
        theirs: Any = peft.get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
        wrapped = theirs.base_model.model[0]
        with torch.no_grad():
            wrapped.miss_block["default"].normal_(std=0.3)
        expected = theirs(x)
        model = nn.Sequential(wrapped.base_layer)
        delta = dw.attach(model, "bat" if init == "bat" else "miss", rank=4, targets="0", **options)
        assert (expected - model(x)).abs().max() > 0.1
        fill(delta.parameters()[0], wrapped.miss_block["default"].tolist())
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("miss[rank=13]", "a block of 13 is larger than '0' allows with its 12 inputs"),
        ("miss[rank=9,blocks=outputs]", "a block of 9 is larger than '0' allows with its 8 outputs"),
        ("miss[rank=4,width=9]", "a block of 9 is larger than '0' allows with its 8 outputs"),
        ("miss[rank=4,width=4,blocks=outputs]", "width repeats a D of the inputs"),
        ("bat[rank=8]", "rank 8 does not divide the sizes of '0' "),
    ],
)
def test_refusals(spec: str, sentence: str) -> None:
    with pytest.raises(dw.UserError, match=sentence):
        layer(spec, torch.zeros(8, 12))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("miss", 87_031_808),
        ("bat", 87_031_808),
        ("miss[rank=16]", 21_757_952),
        ("miss[rank=32]", 43_515_904),
        ("miss[rank=128]", 174_063_616),
        ("miss[width=64]", 7 * 32 * 64 * 64),
        ("miss[blocks=outputs]", 32 * 64 * (6 * 4096 + 11008)),
        ("bat[blocks=inputs]", 32 * 64 * (6 * 4096 + 11008)),
    ],
)
def test_counts_on_llama_2_7b(spec: str, expected: int) -> None:
    assert dw.attach(zoo.real("llama-7b"), spec).report().trainable == expected


def test_count_with_grouped_keys_and_values() -> None:
    """The blocks of Mistral-7B, r = 64: 32 * 64 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096); the paper prints 87.0 M."""
    assert dw.attach(zoo.real("llama3-8b"), "miss").report().trainable == 88_080_384
