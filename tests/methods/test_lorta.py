"""LoRTA: the tensor by hand and as dense matrices, which factor moves what, its layouts, start and counts."""

from typing import Any

import pytest
import torch
import zoo
from conformance import frozen_output
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of


def llama(spec: str = "lorta", **options: Any) -> tuple[nn.Module, dict[str, Any], dw.Delta, Any]:
    """Two blocks of width 32, four query heads and two key heads of 8 features."""
    model, inputs = zoo.ZOO["llama"]()
    delta = dw.attach(model, spec, **options)
    tuner: Any = delta.tuners()[0]
    return model, inputs, delta, tuner.cp


def weight_change(delta: dw.Delta, role: str, block: int) -> Tensor:
    item = next(i for i in delta.attached if (i.place.role, i.place.block) == (f"attention.{role}", block))
    change = delta.change(item)
    assert change is not None
    return change


@torch.no_grad()
def disturb(delta: dw.Delta) -> None:
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.copy_(torch.randn_like(parameter))


def dense(cp: Any, block: int, role: int, heads: int) -> Tensor:
    """D [d, H d_h], built entry by entry from the definition."""
    tensor = torch.einsum("it,tj,ht,t,t->ihj", cp.A, cp.B, cp.C_h[:heads], cp.C_l[block], cp.C_m[role])
    return tensor.flatten(1).detach().double()


@pytest.mark.parametrize(("layout", "expected"), [("outputs", [9.0, 12.0]), ("inputs", [7.0, 14.0])])
def test_toy(layout: str, expected: list[float]) -> None:
    """A = [[1], [2]], B = [[3, 4]], C = 1: D = [[3, 4], [6, 8]]; of [1, 1], x D = [9, 12] and x D^T = [7, 14]."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    tuner: Any = dw.attach(model, "lorta[rank=1,head=2]", layout=layout, targets="0").tuners()[0]
    with torch.no_grad():
        tuner.cp.A.copy_(torch.tensor([[1.0], [2.0]]))
        tuner.cp.B.copy_(torch.tensor([[3.0, 4.0]]))
        for factor in (tuner.cp.C_h, tuner.cp.C_l, tuner.cp.C_m):
            assert factor.shape == (1, 1)
            factor.fill_(1)
    assert torch.equal(dense(tuner.cp, 0, 0, 1).float(), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    assert model(torch.ones(1, 2)).tolist() == [expected]


def test_starts_as_the_base_with_five_tensors() -> None:
    base = frozen_output("llama")
    model, inputs, delta, cp = llama()
    assert torch.equal(zoo.output_of("llama", model, inputs), base)
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in delta.named_parameters()}
    assert shapes == {"A": (32, 8), "B": (8, 8), "C_h": (4, 8), "C_l": (2, 8), "C_m": (4, 8)}
    assert cp.roles == ["attention.q", "attention.k", "attention.v", "attention.o"]
    assert len(delta.tensors()) == 5


def test_change_of_each_matrix_is_the_dense_one() -> None:
    """s D^T for q, k and v (keys and values: the first two heads), s D for o; alpha 4 at rank 2: s = 2."""
    _, _, delta, cp = llama("lorta[rank=2,alpha=4]")
    disturb(delta)
    for block in (0, 1):
        for role, name, heads in ((0, "q", 4), (1, "k", 2), (2, "v", 2)):
            torch.testing.assert_close(
                weight_change(delta, name, block), 2 * dense(cp, block, role, heads).T, rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(weight_change(delta, "o", block), 2 * dense(cp, block, 3, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "turned"), [("outputs", True), ("inputs", False)])
def test_published_layouts(layout: str, turned: bool) -> None:
    """All four matrices one way."""
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "lorta[rank=2]", layout=layout)
    disturb(delta)
    tuner: Any = delta.tuners()[0]
    for role, name in enumerate("qkvo"):
        D = dense(tuner.cp, 1, role, 4)
        torch.testing.assert_close(weight_change(delta, name, 1), D.T if turned else D, rtol=1e-5, atol=1e-5)


def test_a_row_of_a_factor_moves_its_matrices_alone() -> None:
    _, _, delta, cp = llama()
    disturb(delta)
    before = {(n, b): weight_change(delta, n, b) for n in "qkvo" for b in (0, 1)}

    def ratios() -> dict[tuple[str, int], float]:
        after = {key: weight_change(delta, *key) for key in before}
        found = {key: float((after[key] / before[key]).median()) for key in before}
        for key, ratio in found.items():
            torch.testing.assert_close(after[key], ratio * before[key], rtol=1e-3, atol=1e-5)
        return found

    with torch.no_grad():
        cp.C_l[1].mul_(2)
        assert ratios() == pytest.approx({key: 2 if key[1] == 1 else 1 for key in before}, rel=1e-4)
        cp.C_l[1].div_(2)
        cp.C_m[2].mul_(2)
        assert ratios() == pytest.approx({key: 2 if key[0] == "v" else 1 for key in before}, rel=1e-4)


def test_ranks() -> None:
    """At most r for each head and for the whole, since the heads share A."""
    _, _, delta, _ = llama("lorta[rank=3]")
    disturb(delta)
    change = weight_change(delta, "q", 0)
    assert rank_of(change) == 3
    assert [rank_of(head) for head in change.split(8)] == [3] * 4
    _, _, delta, _ = llama("lorta[rank=40]")
    disturb(delta)
    assert rank_of(weight_change(delta, "q", 0)) == 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_factored_forward_equals_the_merged_weight(family: str) -> None:
    """GPT-2: parts of a fused projection; T5: two stacks."""
    base = frozen_output(family)
    model, inputs = zoo.ZOO[family]()
    delta = dw.attach(model, "lorta")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    moved = zoo.output_of(family, model, inputs)
    assert (moved - base).abs().max() > 0.1
    delta.merge()
    torch.testing.assert_close(zoo.output_of(family, model, inputs), moved, rtol=1e-5, atol=2e-5)


def test_first_gradients_are_in_B_alone() -> None:
    model, inputs, _, cp = llama()
    zoo.loss_of("llama", model, inputs).backward()
    assert [float(p.grad.abs().max()) for p in (cp.A, cp.C_h, cp.C_l, cp.C_m)] == [0, 0, 0, 0]
    assert float(cp.B.grad.abs().max()) > 0


def test_start() -> None:
    """A ~ U(+-1/sqrt(r)); C ~ U(+-sqrt(6/r)) at slope 0, U(+-1/sqrt(r)) at slope 1; B = 0."""
    for slope, bound in ((0, (6 / 64) ** 0.5), (1, 64**-0.5)):
        _, _, _, cp = llama(f"lorta[rank=64,slope={slope}]")
        for factor in (cp.C_h, cp.C_l, cp.C_m):
            assert 0.9 * bound < float(factor.detach().abs().max()) <= bound
        assert 0.95 / 8 < float(cp.A.detach().abs().max()) <= 1 / 8
        assert float(cp.B.detach().abs().max()) == 0


def test_heads_that_cannot_be_found_or_do_not_fit() -> None:
    model, _ = zoo.ZOO["plain"]()
    with pytest.raises(dw.UserError, match=r"heads of 'stages.0.wq' cannot be found"):
        dw.attach(model, "lorta")
    with pytest.raises(dw.UserError, match=r"heads of 5 features do not divide 32, a side of 'stages.0.wq'"):
        dw.attach(model, "lorta[head=5]")
    assert dw.attach(model, "lorta[head=16,rank=1]").report().trainable == 32 + 16 + 2 + 2 + 4


def test_grouped_attention_has_no_published_layout() -> None:
    """Keys have 16 outputs: with the heads on their inputs, A would need 16 rows there and 32 elsewhere."""
    _, _, delta, _ = llama("lorta[rank=1,layout=outputs]")
    assert len(delta.parameters()) == 5
    _, _, delta, _ = llama("lorta[rank=1,layout=inputs]")
    assert len(delta.parameters()) == 10


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        ("roberta-base", 4, 3_440),
        ("roberta-base", 8, 6_880),
        ("bert-large", 8, 9_056),  # RoBERTa-large has the same shapes
        ("llama-7b", 8, 34_336),
        ("llama-7b", 235, 1_008_620),
        ("llama3-8b", 8, 34_336),  # grouped keys and values take no rows of their own
        ("t5-large", 8, 8 * (1024 + 64 + 16 + 48 + 4)),
        ("t5-3b", 8, 8 * (1024 + 128 + 32 + 48 + 4)),
        ("t5-11b", 8, 8 * (1024 + 128 + 128 + 48 + 4)),
    ],
)
def test_published_counts(name: str, rank: int, expected: int) -> None:
    """r (d + d_h + H + L + 4); T5 has two stacks of 24 blocks."""
    assert dw.attach(zoo.real(name), "lorta", rank=rank).report().trainable == expected
