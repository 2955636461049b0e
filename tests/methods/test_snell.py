"""SNELL: the kernel and both rules by hand, exact counts, the rank, what the backward pass keeps."""

from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.reparametrized.kernel.snell import SNELLTuner, distances, sparsified

A = torch.tensor([[[0.3], [0.0]], [[0.1], [0.4]]])
B = torch.tensor([[[0.1], [0.5], [0.0]], [[0.2], [0.1], [0.9]]])
D = torch.tensor([[0.01, 0.02, -0.05], [-0.01, 0.02, -0.05]])  # [in, out]


def test_kernel_by_hand() -> None:
    torch.testing.assert_close(distances(A, B, 0.1), D.t())


def test_rules_by_hand() -> None:
    """Half of six: t = 0.02, so both -0.05 stay (and 0.02 is not above itself)."""
    kept = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(sparsified(D, 3, "squared"), -0.0025 * kept)
    torch.testing.assert_close(sparsified(D, 3, "soft"), -0.0015 * kept)
    torch.testing.assert_close(sparsified(D, 6, "squared"), D * D.abs())
    assert not sparsified(D, 0, "squared").any()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rule", ["squared", "soft"])
def test_exactly_as_many_stay(share: float, rule: str) -> None:
    layer = nn.Sequential(nn.Linear(29, 37, bias=False), nn.Identity())
    delta = dw.attach(layer, "snell", targets="0", sparsity=share, rule=rule)
    (tuner,) = delta.tuners()
    assert isinstance(tuner, SNELLTuner)
    zeroed = -int(-share * 37 * 29 // 1)
    assert int((tuner.change(*tuner.inputs()) != 0).sum()) == 37 * 29 - zeroed
    ties = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert int((sparsified(ties, 3, rule) != 0).sum()) == 1


def test_the_squared_rule_holds_the_magnitude_constant() -> None:
    kernel = D.clone().requires_grad_(True)
    kept = sparsified(kernel, 3, "squared")
    upstream = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(kept, kernel, upstream)
    torch.testing.assert_close(gradient, torch.where(kept != 0, D.abs() * upstream, torch.zeros(())))


def test_dense_kernel_has_a_high_rank() -> None:
    """Rank 8 in, and far more out: 64 x 64."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.Identity())
    delta = dw.attach(layer, "snell", targets="0", rank=8, sparsity=0)
    disturb(delta, size=1.0)
    assert delta.report(ranks=True).rows[0].ranks[0] > 32
    other = dw.attach(nn.Sequential(nn.Linear(64, 64), nn.Identity()), "lora", targets="0", rank=8)
    disturb(other, size=1.0)
    assert other.report(ranks=True).rows[0].ranks == [8]


def test_not_the_identity_but_close() -> None:
    for sparsity, low, high in ((0.0, 1e-4, 1e-2), (0.9, 1e-9, 1e-4)):
        delta = dw.attach(nn.Sequential(nn.Linear(768, 768)), "snell", targets="0", sparsity=sparsity)
        (tuner,) = delta.tuners()
        assert isinstance(tuner, SNELLTuner)
        size = float(tuner.change(*tuner.inputs()).detach().abs().mean())
        assert low < size < high
        assert float(tuner.A.detach().abs().max()) == pytest.approx(768**-0.5 / 2, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_recomputed_as_the_effective_weight(name: str) -> None:
    """The checkpointed branch and the weight in place give the same output and the same gradients."""
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "snell", sparsity=0.5)
    disturb(delta)
    branch = gradients(name, model, inputs, delta)
    for tuner in delta.tuners():
        tuner.__class__ = Plain
    plain = gradients(name, model, inputs, delta)
    torch.testing.assert_close(branch[0], plain[0], rtol=1e-5, atol=1e-5)
    for one, two in zip(branch[1], plain[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


class Plain(SNELLTuner):
    """SNELL without its own way around the operation: the engine builds the effective weight."""

    @classmethod
    def gives(cls, form: str) -> bool:
        return form == "weight"


def gradients(name: str, model: nn.Module, inputs: Any, delta: dw.Delta) -> tuple[Tensor, list[Tensor]]:
    for parameter in delta.parameters():
        parameter.grad = None
    zoo.loss_of(name, model, inputs).backward()
    found = [parameter.grad for parameter in delta.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    return zoo.output_of(name, model, inputs).detach(), found  # type: ignore[return-value]


def test_the_backward_pass_keeps_nothing_of_the_size_of_the_weight() -> None:
    layers = nn.Sequential(*(nn.Linear(200, 200) for _ in range(3)))
    base = {parameter.data_ptr() for parameter in layers.parameters()}
    dw.attach(layers, "snell", targets="?")
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in base:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layers(torch.ones(4, 200, requires_grad=True)).sum()
    assert max(saved, default=0) < 200 * 200


def test_merged_equals_unmerged() -> None:
    model, inputs = zoo.ZOO["vit"]()
    delta = dw.attach(model, "snell", sparsity=0.5)
    disturb(delta)
    before = zoo.output_of("vit", model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("vit", model, inputs), before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_large_layers_have_a_threshold() -> None:
    change = torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0))
    assert int((sparsified(change, 1000, "squared") != 0).sum()) == pytest.approx(1000, abs=5)


def test_odd_rank_is_refused() -> None:
    with pytest.raises(dw.UserError, match="rank=7 must be even"):
        dw.attach(nn.Sequential(nn.Linear(9, 9)), "snell", targets="0", rank=7)


@pytest.mark.parametrize(("rank", "expected"), [(8, 1_327_104), (16, 2_654_208), (32, 5_308_416)])
def test_published_count(rank: int, expected: int) -> None:
    with torch.device("meta"):
        model = hf.ViTModel(hf.ViTConfig())
    assert dw.attach(model, "snell", rank=rank, targets="attention,mlp").report().trainable == expected
