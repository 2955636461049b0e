"""LoRA-GA: the start against the singular vectors of a known gradient, what the first step does, saving, counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin, difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.calibration import summed_gradients
from deltaworks.store.checkpoint import resume

OUT, IN = 16, 12


def regression(spec: str = "lora-ga[rank=2]", **options: Any) -> tuple[nn.Module, Any, dw.Delta, list[Any], Any]:
    """A linear layer with a bias on two batches of a least-squares problem."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    delta = dw.attach(model, spec, targets="0", **options)
    data = [(torch.randn(20, IN), torch.randn(20, OUT)) for _ in range(2)]

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return model, delta.tuners()[0], delta, data, loss_of


def gradient(model: Any, data: list[Any]) -> Tensor:
    """The mean of 2 / (n out) (y - t)^T x over the batches."""
    linear = model[0]
    with torch.no_grad():
        pulls = [2 * (nn.functional.linear(x, linear.weight, linear.bias) - t).T @ x / t.numel() for x, t in data]
    return torch.stack(pulls).mean(0)


def aligned(found: Tensor, expected: Tensor, size: float) -> None:
    """Rows that are ``size`` times those expected, up to their signs and to the rounding to bfloat16."""
    products = found @ expected.T / size
    torch.testing.assert_close(products.abs(), torch.eye(len(found)), rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("directions", "a", "b"),
    [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])],
)
def test_starts_from_the_singular_vectors_of_the_mean_gradient(directions: str, a: list[int], b: list[int]) -> None:
    model, tuner, delta, data, loss_of = regression(directions=directions)
    delta.procedure.begin(dw.Run(steps=1, batches=data, loss=loss_of))
    U, S, V = torch.linalg.svd(gradient(model, data))
    size = OUT**0.25 / 16**0.5
    aligned(tuner.A.detach(), V[a], size)
    aligned(tuner.B.detach().T, U.T[b], size)
    assert torch.equal(tuner.A0.float(), tuner.A)
    assert torch.equal(tuner.B0.float(), tuner.B)
    share = float(S[:4].square().sum() / S.square().sum())
    assert delta.procedure.details()["lora_ga_gradient_share"] == {"0": pytest.approx(share, rel=1e-3)}


def test_gamma_and_the_number_of_batches() -> None:
    model, tuner, delta, data, loss_of = regression("lora-ga[rank=2,gamma=4,batches=1]")
    delta.procedure.begin(dw.Run(steps=1, batches=data, loss=loss_of))
    V = torch.linalg.svd(gradient(model, data[:1]))[2]
    aligned(tuner.A.detach(), V[:2], OUT**0.25 / 2)


def test_the_first_step_follows_the_gradient_of_full_fine_tuning() -> None:
    """dB A + B dA, with the gradients of A and B, is s c^2 times the best approximation of G of rank 2 r."""
    model, tuner, delta, data, loss_of = regression("lora-ga[rank=2,alpha=6]", batches=1)
    delta.procedure.begin(dw.Run(steps=1, batches=data, loss=loss_of))
    loss_of(model, data[0]).backward()
    G = gradient(model, data[:1])
    U, S, V = torch.linalg.svd(G)
    best = (U[:, :4] * S[:4]) @ V[:4]
    step = tuner.scale * (tuner.B.grad @ tuner.A + tuner.B @ tuner.A.grad).detach()
    torch.testing.assert_close(step, 3**2 * OUT**0.5 / 16 * best, rtol=1e-2, atol=2e-3)


def test_the_base_is_kept_and_is_what_the_model_computes_at_step_0() -> None:
    model, _, delta, data, loss_of = regression()
    weight = model[0].weight.clone()  # type: ignore[index, operator, union-attr]
    before = model(data[0][0]).detach()
    model.train()
    delta.procedure.begin(dw.Run(steps=1, batches=data, loss=loss_of))
    torch.testing.assert_close(model(data[0][0]), before, rtol=0, atol=1e-4)
    linear: Any = model[0]  # type: ignore[index]
    assert torch.equal(linear.weight, weight)
    assert not linear.weight.requires_grad
    assert linear.weight.grad is None
    assert model.training


def test_the_gradient_is_taken_without_dropout_and_leaves_the_random_state() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, OUT), nn.Dropout(0.5))
        delta = dw.attach(model, "lora-ga[rank=2]", targets="0")
        data = torch.randn(20, IN)
        torch.manual_seed(len(starts))
        state = torch.random.get_rng_state()
        delta.procedure.begin(dw.Run(steps=1, batches=[data], loss=lambda model, x: model(x).square().mean()))
        assert torch.equal(torch.random.get_rng_state(), state)
        starts.append(delta.parameters()[0].detach())
    assert torch.equal(*starts)


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_saved_with_its_start_and_not_started_again(family: str, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO[family]()
    base = zoo.output_of(family, model, inputs).detach()
    delta = dw.attach(model, "lora-ga[rank=2]")
    assert difference(zoo.output_of(family, model, inputs), base) < 1e-6
    begin(delta, family, inputs)
    assert difference(zoo.output_of(family, model, inputs), base) < 1e-4
    assert 0 < min(delta.procedure.details()["lora_ga_gradient_share"].values()) <= 1.001
    disturb(delta)
    moved = zoo.output_of(family, model, inputs)
    trained = delta.report().trainable
    assert 6 * trained <= delta.report().stored_bytes <= 6.1 * trained
    for training in (False, True):
        delta.save(tmp_path, training=training)
        fresh, _ = zoo.ZOO[family]()
        if training:
            loaded = dw.attach(fresh, "lora-ga[rank=2]")
            begin(loaded, family, inputs)
            resume(loaded, tmp_path)
        else:
            loaded = dw.load(fresh, tmp_path)
            begin(loaded, family, inputs)
        assert difference(zoo.output_of(family, fresh, inputs), moved) < 1e-6
    assert loaded.procedure.state() == delta.procedure.state()
    delta.merge()
    assert difference(zoo.output_of(family, model, inputs), moved) < 2e-5


def test_refusals() -> None:
    with pytest.raises(dw.UserError, match=r"lora-ga takes 14 singular vectors for rank 7, and '0' \(16 x 12\) has 12"):
        regression("lora-ga[rank=7]")
    model, _, delta, data, loss_of = regression()
    with pytest.raises(dw.UserError, match=r"call procedure.begin\(run\)"):
        delta.procedure.loss(torch.zeros(()))
    for run in (dw.Run(steps=1, batches=data), dw.Run(steps=1, loss=loss_of)):
        with pytest.raises(dw.UserError, match="gradients of weights need"):
            delta.procedure.begin(run)
    packed = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(dw.UserError, match=r"weights in torch.int8 have none"):
        summed_gradients(model, [packed], dw.Run(steps=1, batches=data, loss=loss_of), 1)
    with torch.no_grad():
        wrong = {"A": torch.zeros(2, IN), "B": torch.zeros(OUT, 2), "A0": torch.zeros(3, IN), "B0": torch.zeros(OUT, 3)}
    with pytest.raises(dw.UserError, match=r"'A0' has shape \[3, 12\], not \[2, 12\]"):
        delta.tuners()[0].restore(wrong)


def test_count_on_llama_2_7b() -> None:
    assert dw.attach(zoo.real("llama-7b"), "lora-ga[rank=64]").report().trainable == 159_907_840
