"""KronA, LoKr and KronA_B against hand-made products, huggingface/peft and the published counts."""

from typing import Any

import peft
import pytest
import torch
import zoo
from conformance import frozen_output
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of
from deltaworks.methods.reparametrized.krona import balanced, kronecker


def linear(out: int, inner: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias))


@torch.no_grad()
def disturb(delta: dw.Delta) -> None:
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.copy_(torch.randn_like(parameter))


def count(model: nn.Module, spec: str, **options: Any) -> int:
    return dw.attach(model, spec, **options).report().trainable


def test_product_by_hand() -> None:
    """[[1, 2]] (x) [[1], [1]] = [[1, 2], [1, 2]]: a change of a 2 x 2 weight."""
    model = linear(2, 2)
    delta = dw.attach(model, "krona", targets="0", a1=1, a2=2)
    tuner: Any = delta.tuners()[0]
    with torch.no_grad():
        tuner.A[0].copy_(torch.tensor([[1.0, 2.0]]))
        tuner.B[0].copy_(torch.tensor([[1.0], [1.0]]))
    assert torch.equal(tuner.weight(torch.zeros(2, 2)), torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    x = torch.tensor([[3.0, 5.0]])
    assert torch.allclose(model(x), nn.functional.linear(x, model[0].weight, model[0].bias) + 13)


@pytest.mark.parametrize("shapes", [((2, 3), (5, 4)), ((5, 4), (2, 3)), ((1, 6), (7, 1)), ((6, 1), (1, 7))])
def test_fast_product_is_the_materialised_one(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    torch.manual_seed(0)
    A, B = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    x = torch.randn(3, 2, A.shape[1] * B.shape[1], dtype=torch.float64)
    torch.testing.assert_close(kronecker(x, A, B), x @ torch.kron(A, B).T)


SPECS = ["krona", "krona[a1=4,a2=2,scale=3]", "lokr", "lokr[rank=1,alpha=3]", "lokr[rank=1,both=true,factor=4]"]


@pytest.mark.parametrize("spec", SPECS)
def test_fast_form_equals_the_weight_form_and_the_merged_weight(spec: str) -> None:
    model = linear(24, 16)
    x = torch.randn(5, 3, 16)
    base = model(x)
    delta = dw.attach(model, spec, targets="0")
    assert torch.equal(model(x), base), "identity at the start"
    disturb(delta)
    tuner = delta.tuners()[0]
    moved = model(x)
    assert (moved - base).abs().max() > 0.5
    expected = nn.functional.linear(x, tuner.weight(model[0].weight), model[0].bias)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)
    delta.unmerge()
    delta.detach()
    assert torch.equal(model(x), base)


def test_nothing_of_the_size_of_the_weight_is_formed_forward_or_backward() -> None:
    """The largest tensor kept for the backward pass is the input itself."""
    model = linear(256, 256, bias=False)
    dw.attach(model, "krona", targets="0")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore
        y = model(torch.randn(2, 256))
    base = {model[0].weight.numel()}
    assert max(size for size in kept if size not in base) <= 2 * 256
    y.sum().backward()


def test_rank_of_the_change_is_the_product_of_the_ranks() -> None:
    model = linear(24, 24)
    delta = dw.attach(model, "krona", targets="0")
    disturb(delta)
    tuner: Any = delta.tuners()[0]
    assert tuner.A[0].shape == (6, 4)
    assert tuner.B[0].shape == (4, 6)
    assert rank_of(tuner.weight(torch.zeros(24, 24)).detach()) == 4 * 4
    with torch.no_grad():
        tuner.A[0].copy_(torch.outer(torch.randn(6), torch.randn(4)))
    assert rank_of(tuner.weight(torch.zeros(24, 24)).detach()) == 1 * 4


def test_shape_of_the_factors() -> None:
    """The sizes of the paper for 768; a prime size leaves one factor degenerate."""
    assert balanced(768, 768) == (32, 24)
    a1, a2 = balanced(3072, 768)
    assert a1 * a2 == 1536  # sqrt(3072 * 768): A and B of equal size
    assert balanced(7, 16) in {(7, 2), (1, 8), (7, 1), (1, 16), (1, 4), (7, 4)}
    with pytest.raises(dw.UserError, match=r"a1=5, a2=4 do not divide the sizes of '0' \(24 x 16\)"):
        dw.attach(linear(24, 16), "krona[a1=5]", targets="0")


def test_first_gradients() -> None:
    """B starts at zero: A gets no gradient at step 0, B does; the low-rank B likewise."""
    model = linear(64, 64)
    delta = dw.attach(model, "lokr[rank=2]", targets="0")
    tuner: Any = delta.tuners()[0]
    model(torch.randn(4, 64)).square().sum().backward()
    assert [p.shape for p in (*tuner.A, *tuner.B)] == [(8, 8), (8, 2), (2, 8)]
    assert float(tuner.A[0].grad.abs().max()) == 0
    assert float(tuner.B[0].grad.abs().max()) == 0
    assert float(tuner.B[1].grad.abs().max()) > 0


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_lokr_equals_peft(kind: str, both: bool) -> None:
    """The factors copied over from huggingface/peft give its outputs."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(64, 144) if kind == "linear" else nn.Conv2d(36, 64, 3, padding=1)
    x = torch.randn(2, 64) if kind == "linear" else torch.randn(2, 36, 5, 5)
    config = peft.LoKrConfig(r=2, alpha=6, target_modules=["0"], decompose_both=both, init_weights=False)
    theirs: Any = peft.get_peft_model(nn.Sequential(layer), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    delta = dw.attach(model, "lokr", rank=2, alpha=6, both=both, targets="0")
    tuner: Any = delta.tuners()[0]
    names = ["lokr_w1_a", "lokr_w1_b"] if both else ["lokr_w1"]
    with torch.no_grad():
        for mine, name in zip([*tuner.A, *tuner.B], [*names, "lokr_w2_a", "lokr_w2_b"], strict=True):
            mine.copy_(getattr(wrapped, name)["default"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


QV = "attention.q,attention.v,cross_attention.q,cross_attention.v"


def test_published_count_of_krona() -> None:
    """T5-base: 36 attention blocks * 2 matrices * 2 * 768."""
    assert count(zoo.real("t5-base"), "krona", targets=QV) == 110_592


@pytest.mark.parametrize(("name", "expected"), [("t5-large", 221_184), ("t5-3b", 405_504), ("t5-11b", 774_144)])
def test_published_counts_of_lokr(name: str, expected: int) -> None:
    assert count(zoo.real(name), "lokr", targets=QV, rank=8) == expected


def test_lokr_scale_is_one_where_no_factor_is_decomposed() -> None:
    model = linear(16, 16)
    tuner: Any = dw.attach(model, "lokr[rank=8,alpha=80]", targets="0").tuners()[0]
    assert (len(tuner.A), len(tuner.B), tuner.scale) == (1, 1, 1.0)
    tuner = dw.attach(model, "lokr[rank=1,alpha=10]", targets="0", name="low").tuners()[0]
    assert (len(tuner.A), len(tuner.B), tuner.scale) == (1, 2, 10.0)


# ---------------------------------------------------------------------------- KronA_B


def test_parallel_count_and_identity() -> None:
    """T5-base: 24 feed-forwards * 2 * 768, and one scalar each with the residual."""
    assert count(zoo.real("t5-base"), "krona-b") == 24 * 1536
    assert count(zoo.real("t5-base"), "krona-b[residual=true]") == 24 * 1537
    base = frozen_output("t5")
    model, inputs = zoo.ZOO["t5"]()
    delta = dw.attach(model, "krona-b[residual=true]")
    assert torch.equal(zoo.output_of("t5", model, inputs), base), "B = 0 and s_res = 0"
    disturb(delta)
    with torch.no_grad():
        for tuner in delta.tuners():
            tuner.A.zero_()  # type: ignore[union-attr, operator]
            tuner.residual.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(zoo.output_of("t5", model, inputs), base), "A = 0 and s_res = 0"


def test_parallel_formula() -> None:
    """FFN(x) + s (A (x) B) x + s_res x, with x the input of the feed-forward."""
    model, _ = zoo.ZOO["llama"]()
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 3, zoo.WIDTH)
    plain = mlp(x)
    delta = dw.attach(model, "krona-b[residual=true,scale=2]")
    disturb(delta)
    tuner: Any = delta.tuners()[0]
    change: Tensor = 2 * torch.kron(tuner.A, tuner.B)
    torch.testing.assert_close(mlp(x), plain + x @ change.T + tuner.residual * x, rtol=1e-5, atol=1e-5)
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()
