"""LoRA-FA: what stays, what is kept for the backward pass, what is stored, and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import deltaworks as dw


def attached(spec: str = "lora-fa", **options: Any) -> tuple[nn.Sequential, dw.Delta, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    delta = dw.attach(model, spec, targets="0", **options)
    return model, delta, delta.tuners()[0]


def test_A_is_unchanged_after_training_and_B_is_not() -> None:
    model, delta, tuner = attached("lora-fa[rank=4]")
    x, target = torch.randn(16, 32), torch.randn(16, 48)
    before = tuner.A.clone()
    optimizer = torch.optim.AdamW(delta.parameter_groups(0.1))
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(tuner.A, before)
    assert float(tuner.B.detach().abs().min()) > 0
    assert losses[-1] < losses[0]


def test_change_by_hand() -> None:
    """alpha 2, r 1, A = [1, 2, 0, ...], B = [3, 4, 0, ...]^T: the corner of dW is [[6, 12], [8, 16]]."""
    _, _, tuner = attached("lora-fa[rank=1,alpha=2]")
    with torch.no_grad():
        tuner.A.zero_()[0, :2] = torch.tensor([1.0, 2.0])
        tuner.B.zero_()[:2, 0] = torch.tensor([3.0, 4.0])
    change = tuner.weight(torch.zeros(48, 32))
    assert torch.equal(change[:2, :2], torch.tensor([[6.0, 12.0], [8.0, 16.0]]))
    assert int(change.count_nonzero()) == 4


def test_the_gradient_is_that_of_B_in_lora() -> None:
    """grad B = s g (A x)^T; a LoRA with the same A gets the same."""
    x = torch.randn(5, 32)
    model, _, tuner = attached("lora-fa[rank=4,alpha=8]")
    model(x).square().sum().backward()
    other, _, lora = attached("lora[rank=4,alpha=8]")
    with torch.no_grad():
        lora.A.copy_(tuner.A)
    y = other(x)
    y.square().sum().backward()
    torch.testing.assert_close(tuner.B.grad, lora.B.grad)
    torch.testing.assert_close(tuner.B.grad, 2 * (2 * y.detach()).T @ (x @ tuner.A.T))


def test_the_input_is_not_kept_for_the_backward_pass() -> None:
    kept: dict[str, list[int]] = {}
    for spec in ("lora-fa[rank=4]", "lora[rank=4]"):
        model, delta, _ = attached(spec)
        with torch.no_grad():
            delta.parameters()[-1].fill_(0.1)
        x = torch.randn(1000, 32)
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=found: to.append(t) or t, lambda t: t):  # type: ignore
            model(x)
        kept[spec] = sorted({t.numel() for t in found if t.numel() >= 1000})
    assert kept == {"lora-fa[rank=4]": [4000], "lora[rank=4]": [32000]}


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_only_B_is_stored_and_A_comes_back_from_the_seed(kind: str, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48) if kind == "linear" else nn.Embedding(32, 48))

    x = torch.randn(3, 32) if kind == "linear" else torch.arange(32)
    model = base()
    delta = dw.attach(model, "lora-fa", targets="0", seed=5)
    assert torch.equal(model(x), base()(x))
    with torch.no_grad():
        delta.parameters()[0].normal_()
    assert sorted(delta.tensors()) == ["0.B"]
    moved = model(x)
    delta.save(tmp_path)
    fresh = base()
    torch.manual_seed(99)
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(x), moved)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5)


def test_start_of_A() -> None:
    """U(+-1/sqrt(in)); for an embedding N(0, 1), since a token reads one column of it."""
    _, _, tuner = attached("lora-fa[rank=16]")
    assert 0.95 * 32**-0.5 < float(tuner.A.abs().max()) <= 32**-0.5
    table = nn.Sequential(nn.Embedding(100, 48))
    embedded: Any = dw.attach(table, "lora-fa[rank=16]", targets="0").tuners()[0]
    assert float(embedded.A.std()) == pytest.approx(1, rel=0.1)


QV = "attention.q,attention.v"
T5_QV = f"{QV},cross_attention.q,cross_attention.v"


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("roberta-base", QV, 8, 294_912 // 2),
        ("llama-3.2-3b", QV, 32, 28 * 32 * (3072 + 1024)),
        ("t5-large", T5_QV, 8, 144 * 8 * 1024),
        ("t5-3b", T5_QV, 8, 144 * 8 * 4096),
        ("t5-11b", T5_QV, 8, 144 * 8 * 16384),
    ],
)
def test_counts(name: str, targets: str, rank: int, expected: int) -> None:
    """r * out for each weight."""
    assert dw.attach(zoo.real(name), "lora-fa", targets=targets, rank=rank).report().trainable == expected
