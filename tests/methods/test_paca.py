"""PaCA: hand-computed columns, gradients against a dense reference, what the backward pass keeps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.layers import damped


def layer(
    weight: Tensor, bias: bool = False, rank: int = 1, **options: object
) -> tuple[nn.Linear, nn.Module, dw.Delta]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = nn.Sequential(linear, nn.Identity(), nn.Linear(weight.shape[0], 1))
    return linear, model, dw.attach(model, "paca", targets="0", rank=rank, **options)


def test_by_hand() -> None:
    linear, _, delta = layer(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), alpha=2)
    tuner = delta.attached[0].tuner
    with torch.no_grad():
        tuner.index.fill_(2)
        tuner.change.copy_(torch.tensor([[0.5], [-1.0]]))
    x = torch.ones(1, 3, requires_grad=True)
    y = linear(x)
    assert y.tolist() == [[7.0, 13.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[5.0, 7.0, 8.0]]
    assert tuner.change.grad.tolist() == [[2.0], [2.0]]
    delta.merge()
    assert linear.weight.tolist() == [[1.0, 2.0, 4.0], [4.0, 5.0, 4.0]]
    assert linear(x).tolist() == [[7.0, 13.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_gradients_match_a_dense_reference(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    linear, _, delta = layer(weight, bias, rank=3, alpha=6)
    tuner = delta.attached[0].tuner
    disturb(delta)
    x, pull = torch.randn(*shape, 8, requires_grad=True), torch.randn(*shape, 6)
    (linear(x) * pull).sum().backward()
    dense = weight.clone()
    dense[:, tuner.index.long()] += 2 * tuner.change.detach()
    dense.requires_grad_()
    again = x.detach().clone().requires_grad_()
    (F.linear(again, dense, linear.bias) * pull).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuner.change.grad, 2 * dense.grad[:, tuner.index.long()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (4, 16)])
def test_the_backward_pass_keeps_the_chosen_columns_alone(shape: tuple[int, ...]) -> None:
    """64 tokens, 32 inputs, 16 outputs, r = 2: x[idx] and the change; the frozen weight is kept anyway."""
    linear, _, delta = layer(torch.randn(16, 32), rank=2)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(*shape, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    own = {tensor.data_ptr(): tensor for tensor in kept if tensor.data_ptr() != linear.weight.data_ptr()}
    assert all(tensor.numel() < 64 * 16 for tensor in own.values())
    assert x.data_ptr() not in own
    assert sum(tensor.numel() for tensor in own.values()) <= 64 * 2 + 16 * 2 + 2
    assert delta.parameters()[0].shape == (16, 2)


def test_keeps_its_columns_alone() -> None:
    """Of an input that cannot be made again LoRA keeps all, PaCA its columns."""
    kept = {}
    for method in ("lora", "paca"):
        model = nn.Sequential(nn.Linear(64, 48))
        dw.attach(model, method, targets="0", rank=4)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):  # type: ignore
            model(torch.randn(100, 64, requires_grad=True)).sum().backward()
        kept[method] = max(size for size in sizes if size != 48 * 64)  # the weight
    assert kept == {"lora": 100 * 64, "paca": 100 * 4}


@pytest.mark.parametrize("training", [True, False])
def test_a_part_of_it_acts_where_it_is_damped(training: bool) -> None:
    linear, _, delta = layer(torch.randn(6, 8), rank=3)
    disturb(delta)
    x = torch.randn(5, 8)
    with torch.set_grad_enabled(training):
        whole = linear(x)
        with damped(delta.tuners(), 0.25):
            part = linear(x)
        with delta.disabled():
            base = linear(x)
    torch.testing.assert_close(part, base + 0.25 * (whole - base), rtol=1e-5, atol=1e-5)


def test_the_base_is_untouched_also_when_the_layer_fails() -> None:
    linear, _, delta = layer(torch.randn(4, 6), rank=2)
    disturb(delta)
    before = linear.weight.clone()
    linear(torch.randn(3, 6)).sum().backward()
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 7))
    assert torch.equal(linear.weight, before)


def test_converts_into_a_lora_and_merges() -> None:
    model, inputs = zoo.ZOO["gpt2"]()
    delta = dw.attach(model, "paca", rank=3, alpha=6)
    disturb(delta)
    expected = zoo.output_of("gpt2", model, inputs)
    twin, _ = zoo.ZOO["gpt2"]()
    lora = dw.attach(twin, "lora", rank=3, alpha=3, targets="linear")
    for ours, theirs in zip(delta.attached, lora.attached, strict=True):
        A, B, scale = ours.tuner.factors()
        assert ((A == 1).sum(1) == 1).all()
        assert float(A.sum()) == 3
        with torch.no_grad():
            theirs.tuner.A.copy_(A)
            theirs.tuner.B.copy_(scale * B)
    torch.testing.assert_close(zoo.output_of("gpt2", twin, inputs), expected, rtol=1e-5, atol=1e-5)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("gpt2", model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_starts_as_the_base_exactly() -> None:
    model, inputs = zoo.ZOO["llama"]()
    model.requires_grad_(False)
    base = zoo.output_of("llama", model, inputs)
    dw.attach(model, "paca")
    assert torch.equal(zoo.output_of("llama", model, inputs), base)


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("llama-7b", 8, 10_878_976), ("llama-7b", 16, 21_757_952), ("llama3-8b", 64, 88_080_384)],
)
def test_published_counts(name: str, rank: int, expected: int) -> None:
    delta = dw.attach(zoo.real(name), "paca", rank=rank)
    assert sum(parameter.numel() for parameter in delta.parameters()) == expected
    assert delta.report().stored_bytes <= 4.1 * expected


def test_columns_are_distinct_and_survive_another_seed(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "paca", rank=5, seed=3)
    disturb(delta)
    for item in delta.attached:
        index = item.tuner.index
        assert len(set(index.tolist())) == 5
        assert int(index.min()) >= 0
        assert int(index.max()) < item.tuner.inner
    assert len({tuple(item.tuner.index.tolist()) for item in delta.attached}) > 1
    fresh, _ = zoo.ZOO["bert"]()
    other = dw.attach(fresh, "paca", rank=5, seed=4)
    assert any(
        not torch.equal(a.tuner.index, b.tuner.index) for a, b in zip(delta.attached, other.attached, strict=True)
    )
    other.restore(delta.tensors())
    assert torch.equal(zoo.output_of("bert", fresh, inputs), zoo.output_of("bert", model, inputs))
    key = next(key for key in delta.tensors() if key.endswith("index"))
    with pytest.raises(dw.UserError, match="ascending columns"):
        other.restore(delta.tensors() | {key: delta.tensors()[key] + 1000})


def test_a_step_acts_at_once_and_small_steps_are_not_lost_in_bfloat16() -> None:
    linear, model, delta = layer(torch.ones(2, 4), rank=2)
    model.to(torch.bfloat16)
    linear.weight.data = linear.weight.data.to(torch.bfloat16)
    parameter = delta.parameters()[0]
    parameter.data = parameter.data.float()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    before = linear(x).clone()
    for _ in range(1000):  # each step is far below the spacing of bfloat16 at one, 0.0078
        parameter.grad = torch.full_like(parameter, -1e-4)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), 0.1), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert (linear(x) > before).all()
    delta.merge()
    assert int((linear.weight != 1).sum()) == 4


def test_a_quantized_layer_keeps_its_storage() -> None:
    """The product stands beside the layer, so the layer may compute from any storage."""

    class Int8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.codes.float() * 0.01)

    linear = Int8Linear(6, 4, bias=False)
    linear.register_buffer("codes", torch.randint(-100, 100, (4, 6), dtype=torch.int8))
    codes = linear.codes.clone()
    delta = dw.attach(nn.Sequential(linear, nn.Identity(), nn.Linear(4, 1)), "paca", targets="0", rank=2)
    disturb(delta)
    x = torch.randn(3, 6)
    dense = codes.float() * 0.01
    tuner = delta.attached[0].tuner
    dense[:, tuner.index.long()] += tuner.change.detach()
    torch.testing.assert_close(linear(x), F.linear(x, dense), rtol=1e-3, atol=1e-3)
    linear(x).sum().backward()
    assert torch.equal(linear.codes, codes)


def test_more_columns_than_inputs_are_refused() -> None:
    model, _ = zoo.ZOO["bert"]()
    with pytest.raises(dw.UserError, match="larger than the 32 input columns"):
        dw.attach(model, "paca", rank=33)
