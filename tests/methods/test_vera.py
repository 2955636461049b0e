"""VeRA: one random pair for the whole model, what is trained and stored, huggingface/peft and the published counts."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import nn

import deltaworks as dw
from deltaworks.core.report import rank_of


def model() -> Any:
    """Two layers of different shapes, neither of them square: [8 x 12], [20 x 8]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 20))


def attached(spec: str, **options: Any) -> tuple[Any, dw.Delta, list[Any]]:
    made = model()
    delta = dw.attach(made, spec, targets="0,2", **options)
    return made, delta, delta.tuners()


@torch.no_grad()
def disturb(delta: dw.Delta) -> None:
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


def test_start_is_the_base_and_the_published_one() -> None:
    """A ~ U(+-sqrt(6 / largest in)), B ~ U(+-sqrt(6 / r)), b = 0, d = 0.1."""
    x = torch.randn(4, 12)
    made, _, (first, second) = attached("vera[rank=64]")
    assert torch.equal(made(x), model()(x))
    pair = first.projection
    assert second.projection is pair
    assert (pair.A.shape, pair.B.shape) == ((64, 12), (20, 64))
    for tensor, bound in ((pair.A, (6 / 12) ** 0.5), (pair.B, (6 / 64) ** 0.5)):
        assert 0.95 * bound < float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.equal(first.d, torch.full((64,), 0.1))
    assert first.b.shape == (8,)
    assert float(first.b.detach().abs().max()) == 0


def test_change_is_the_closed_form_cut_from_the_shared_pair() -> None:
    _, delta, tuners = attached("vera[rank=5]")
    disturb(delta)
    pair = tuners[0].projection
    for tuner, out, inner in zip(tuners, (8, 20), (12, 8), strict=True):
        expected = torch.diag(tuner.b) @ pair.B[:out] @ torch.diag(tuner.d) @ pair.A[:, :inner]
        torch.testing.assert_close(tuner.weight(torch.zeros(out, inner)), expected)


def test_rank_of_the_change_is_at_most_r() -> None:
    _, delta, _ = attached("vera[rank=3]")
    disturb(delta)
    changes = [delta.change(item) for item in delta.attached]
    assert [rank_of(change) for change in changes if change is not None] == [3, 3]


def test_the_pair_is_neither_trained_nor_stored_and_comes_back_from_the_seed(tmp_path: Path) -> None:
    made, delta, _ = attached("vera[rank=6]", seed=3)
    disturb(delta)
    assert sorted(delta.tensors()) == ["0.b", "0.d", "2.b", "2.d"]
    assert delta.report().trainable == (8 + 6) + (20 + 6)
    assert delta.report().stored_bytes == 4 * delta.report().trainable
    made(torch.randn(2, 12)).sum().backward()
    tuner: Any = delta.tuners()[0]
    assert not tuner.projection.A.requires_grad
    x = torch.randn(2, 12)
    delta.save(tmp_path)
    torch.manual_seed(99)
    fresh = model()
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(x), made(x))
    other, _, (first, _) = attached("vera[rank=6]", seed=4)
    assert not torch.equal(first.projection.A, tuner.projection.A)
    assert other is not made


def test_count_of_one_layer() -> None:
    """out + r, whatever the inputs: 48 + 256."""
    assert dw.attach(nn.Sequential(nn.Linear(32, 48)), "vera", targets="0").report().trainable == 304


def test_moving_the_model_keeps_one_pair() -> None:
    made, _, (first, second) = attached("vera[rank=6]")
    made.to(torch.float64)
    assert first.projection.A.dtype == torch.float64
    assert first.projection.A is second.projection.A


def test_merge_and_unmerge() -> None:
    made, delta, _ = attached("vera")
    disturb(delta)
    x = torch.randn(4, 12)
    moved = made(x)
    assert (moved - model()(x)).abs().max() > 0.1
    delta.merge()
    torch.testing.assert_close(made(x), moved, rtol=1e-5, atol=1e-5 * float(moved.detach().abs().max()))
    delta.unmerge()
    assert torch.equal(made[0].weight, model()[0].weight)


def test_equals_peft() -> None:
    """Its shared pair and its vectors give its outputs."""
    torch.manual_seed(0)
    config = peft.VeraConfig(r=5, target_modules=["0", "2"], d_initial=0.1)
    theirs: Any = peft.get_peft_model(model(), config)  # type: ignore[arg-type]
    layers = [theirs.base_model.model[index] for index in (0, 2)]
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in layers:
            layer.vera_lambda_b["default"].normal_()
            layer.vera_lambda_d["default"].normal_()
    made, _, tuners = attached("vera[rank=5]")
    pair = tuners[0].projection
    A, B = layers[0].vera_A["default"], layers[0].vera_B["default"]
    assert (pair.A.shape, pair.B.shape) == (A.shape, B.shape)
    with torch.no_grad():
        pair.A.copy_(A)
        pair.B.copy_(B)
        for tuner, layer in zip(tuners, layers, strict=True):
            tuner.b.copy_(layer.vera_lambda_b["default"])
            tuner.d.copy_(layer.vera_lambda_d["default"])
    x = torch.randn(3, 12)
    torch.testing.assert_close(made(x), theirs(x), rtol=1e-5, atol=1e-5)


QV = "attention.q,attention.v"
T5_QV = f"{QV},cross_attention.q,cross_attention.v"


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("roberta-base", QV, 1024, 43_008),
        ("bert-large", QV, 256, 61_440),  # RoBERTa-large has the same shapes
        ("gpt2-medium", QV, 1024, 98_304),
        ("t5-large", T5_QV, 256, 72 * 2 * (1024 + 256)),
        ("t5-3b", T5_QV, 256, 72 * 2 * (4096 + 256)),
        ("t5-11b", T5_QV, 256, 72 * 2 * (16384 + 256)),
    ],
)
def test_published_counts(name: str, targets: str, rank: int, expected: int) -> None:
    assert dw.attach(zoo.real(name), "vera", targets=targets, rank=rank).report().trainable == expected


def test_count_of_a_layer_that_is_not_square() -> None:
    """48 x 32 at rank 7: out + r."""
    delta = dw.attach(nn.Sequential(nn.Linear(32, 48)), "vera[rank=7]", targets="0")
    assert delta.report().trainable == 48 + 7
