"""LoHa: the product by hand, as factors, against huggingface/peft; its rank and counts."""

from typing import Any

import peft
import pytest
import torch
import transformers as hf
import zoo
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of

KINDS = ("linear", "conv1d", "conv2d", "embedding")


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer with 24 inputs and 16 outputs, and something to put in."""
    torch.manual_seed(0)
    if kind == "conv2d":
        return nn.Conv2d(24, 16, 3, padding=1), torch.randn(2, 24, 5, 5)
    if kind == "embedding":
        return nn.Embedding(24, 16), torch.randint(0, 24, (2, 5))
    conv1d = hf.pytorch_utils.Conv1D(16, 24)
    nn.init.normal_(conv1d.weight)
    return nn.Linear(24, 16) if kind == "linear" else conv1d, torch.randn(2, 5, 24)


def attached(kind: str, spec: str, **options: Any) -> tuple[Any, Tensor, dw.Delta, Any]:
    module, x = layer(kind)
    model = nn.Sequential(module)
    delta = dw.attach(model, spec, targets="0", **options)
    return model, x, delta, delta.tuners()[0]


@torch.no_grad()
def disturb(delta: dw.Delta) -> None:
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.copy_(0.5 * torch.randn_like(parameter))


def test_product_by_hand() -> None:
    """([1, 2]^T [1, 1]) * ([1, 1]^T [3, 5]) = [[3, 5], [6, 10]]; alpha 2 at r 1 doubles it."""
    model = nn.Sequential(nn.Linear(2, 2))
    tuner: Any = dw.attach(model, "loha[rank=1,alpha=2]", targets="0").tuners()[0]
    with torch.no_grad():
        tuner.B1.copy_(torch.tensor([[1.0], [2.0]]))
        tuner.A1.copy_(torch.tensor([[1.0, 1.0]]))
        tuner.B2.copy_(torch.tensor([[1.0], [1.0]]))
        tuner.A2.copy_(torch.tensor([[3.0, 5.0]]))
    expected = torch.tensor([[6.0, 10.0], [12.0, 20.0]])
    assert torch.equal(tuner.weight(torch.zeros(2, 2)), expected)
    A, B, scale = tuner.factors()
    assert torch.equal(scale * B @ A, expected)


def test_factors_of_rank_r_squared_are_the_product() -> None:
    _, _, delta, tuner = attached("linear", "loha[rank=3,alpha=6]")
    disturb(delta)
    A, B, scale = tuner.factors()
    assert (A.shape, B.shape, scale) == ((9, 24), (16, 9), 2)
    torch.testing.assert_close(scale * B @ A, 2 * (tuner.B1 @ tuner.A1) * (tuner.B2 @ tuner.A2))
    torch.testing.assert_close(scale * B @ A, tuner.weight(torch.zeros(16, 24)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_reaches_r_squared_and_not_more(rank: int) -> None:
    _, _, delta, _ = attached("linear", f"loha[rank={rank}]")
    disturb(delta)
    change = delta.change(delta.attached[0])
    assert change is not None
    assert rank_of(change) == rank**2


@pytest.mark.parametrize("kind", KINDS)
def test_identity_merge_and_unmerge(kind: str) -> None:
    module, x = layer(kind)
    base, weight = module(x).detach(), module.weight.detach().clone()  # type: ignore[operator, union-attr]
    model, _, delta, _ = attached(kind, "loha[rank=4,alpha=8]")
    assert torch.equal(model(x), base)
    disturb(delta)
    moved = model(x)
    assert (moved - base).abs().max() > 0.1
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5 * float(moved.detach().abs().max()))
    delta.unmerge()
    assert torch.equal(model[0].weight, weight)


def test_start() -> None:
    """B1 ~ N(0, 0.1^2), A1 and A2 ~ N(0, 1), B2 = 0."""
    model = nn.Sequential(nn.Linear(400, 300))
    tuner: Any = dw.attach(model, "loha", targets="0").tuners()[0]
    deviations = [float(p.detach().std()) for p in (tuner.B1, tuner.A1, tuner.B2, tuner.A2)]
    assert deviations == pytest.approx([0.1, 1, 0, 1], rel=0.05)


def test_first_gradients_are_in_B2_alone() -> None:
    model, x, _, tuner = attached("linear", "loha")
    model(x).square().sum().backward()
    gradients = [float(p.grad.abs().max()) for p in (tuner.B1, tuner.A1, tuner.A2)]
    assert gradients == [0, 0, 0]
    assert float(tuner.B2.grad.abs().max()) > 0


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 256))
    delta = dw.attach(model, "loha[rank=2]", targets="0")
    disturb(delta)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore
        model(torch.randn(4, 256, requires_grad=True))
    weight = model[0].weight.data_ptr()
    assert max(t.numel() for t in kept if t.data_ptr() != weight) == 4 * 256


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_equals_peft(kind: str) -> None:
    """The factors copied over from huggingface/peft give its outputs."""
    module, x = layer(kind)
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["0"], init_weights=False)
    theirs: Any = peft.get_peft_model(nn.Sequential(module), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    expected, base = theirs(x), wrapped.base_layer(x)
    model = nn.Sequential(wrapped.base_layer)
    tuner: Any = dw.attach(model, "loha[rank=3,alpha=6]", targets="0").tuners()[0]
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    with torch.no_grad():
        for mine, name in names.items():
            getattr(tuner, mine).copy_(getattr(wrapped, name)["default"])
    assert (expected - base).abs().max() > 0.03
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


QV = "attention.q,attention.v"
T5_QV = f"{QV},cross_attention.q,cross_attention.v"


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("llama-3.2-3b", QV, 32, 18_350_080),  # the 18.35 M of the public comparison
        ("t5-large", T5_QV, 8, 2 * 2_359_296),
        ("t5-3b", T5_QV, 8, 2 * 5_898_240),
        ("t5-11b", T5_QV, 8, 2 * 20_054_016),
    ],
)
def test_counts_are_twice_those_of_lora(name: str, targets: str, rank: int, expected: int) -> None:
    assert dw.attach(zoo.real(name), "loha", targets=targets, rank=rank).report().trainable == expected
