"""S2-LoRA: shared factors and own coefficients by hand, the sparsity in its two ways, resuming, and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of


def toy(width: int = 8) -> nn.Sequential:
    """Two layers of one shape, one of another."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2 * width))


def attached(spec: str, width: int = 8, targets: str = "0,1,2") -> tuple[nn.Sequential, dw.Delta, list[Any]]:
    model = toy(width)
    delta = dw.attach(model, spec, targets=targets)
    return model, delta, delta.tuners()


def change(delta: dw.Delta, number: int) -> Tensor:
    found = delta.change(delta.attached[number])
    assert found is not None
    return found


def train(model: nn.Module, delta: dw.Delta, first: int, last: int, steps: int = 30, rate: float = 0.1) -> None:
    """Plain gradient descent: nothing but the adapter and its procedure has a state."""
    delta.procedure.begin(dw.Run(steps=steps))
    for step in range(first, last):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        target = torch.cat([x, x.roll(1, dims=1)], dim=1)
        delta.procedure.loss((model(x) - target).square().mean()).backward()
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.sub_(rate * parameter.grad)  # type: ignore[operator]
        delta.procedure.stepped()
        model.zero_grad()


@pytest.mark.parametrize("unit", ["true", "false"])
def test_change_by_hand(unit: str) -> None:
    """A = B = I, e_1 = (2, 0), e_2 = (0, 3): dW_1 = [[2, 0], [0, 0]], dW_2 = [[0, 0], [0, 3]]."""
    _, delta, (one, two) = attached(f"s2-lora[rank=2,unit={unit}]", width=2, targets="0,1")
    assert one.A is two.A
    assert one.B is two.B
    with torch.no_grad():
        one.A.copy_(torch.eye(2))
        one.B.copy_(torch.eye(2))
        one.e.copy_(torch.tensor([2.0, 0.0]))
        two.e.copy_(torch.tensor([0.0, 3.0]))
    assert change(delta, 0).float() == pytest.approx(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert change(delta, 1).float() == pytest.approx(torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    before = change(delta, 1)
    with torch.no_grad():
        one.e.fill_(1)
    assert torch.equal(change(delta, 1), before), "a weight's coefficients are its own"
    with torch.no_grad():
        one.A.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert change(delta, 0).float() == pytest.approx(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert change(delta, 1).float() == pytest.approx(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))


def test_norms_do_not_count_and_scale_does() -> None:
    """With unit rows and columns, growing A and B changes nothing; alpha 6 at rank 2 triples."""
    _, delta, (tuner, *_) = attached("s2-lora[rank=2,alpha=6]")
    with torch.no_grad():
        tuner.e.copy_(torch.tensor([1.0, 0.5]))
    first = change(delta, 0)
    assert torch.linalg.svdvals(first)[0] <= 3 * 1.5
    assert float(first.norm()) > 1
    with torch.no_grad():
        tuner.A.mul_(7)
        tuner.B.mul_(0.1)
    torch.testing.assert_close(change(delta, 0), first, rtol=1e-5, atol=1e-6)
    _, delta, (tuner, *_) = attached("s2-lora[rank=2,unit=false]")
    with torch.no_grad():
        tuner.e.fill_(1)
        first = change(delta, 0)
        tuner.A.mul_(7)
    torch.testing.assert_close(change(delta, 0), 7 * first, rtol=1e-4, atol=1e-6)


def test_one_pair_for_each_shape() -> None:
    _, delta, (one, two, three) = attached("s2-lora[rank=4]")
    assert one.A is two.A
    assert three.A is not one.A
    assert (three.A.shape, three.B.shape) == ((4, 8), (16, 4))
    names = [name for name, _ in delta.named_parameters()]
    assert len(names) == len(set(names)) == 2 * 2 + 3
    assert delta.report().trainable == 4 * (8 + 8) + 4 * (8 + 16) + 3 * 4
    assert sorted(delta.tensors()) == sorted(names)


@pytest.mark.parametrize(("spec", "moving"), [("s2-lora[rank=4]", "e"), ("s2-lora[rank=4,zero=B,unit=false]", "B")])
def test_starts_as_the_base_and_first_gradients(spec: str, moving: str) -> None:
    x = torch.randn(5, 8)
    model, delta, (tuner, *_) = attached(spec)
    assert torch.equal(model(x), toy()(x))
    delta.procedure.loss(model(x).square().sum()).backward()
    moved = {name for name in ("A", "B", "e") if float(getattr(tuner, name).grad.abs().max()) > 0}
    # |e| has a gradient of its own where e starts at one
    assert moved == ({"e"} if moving == "e" else {"B", "e"})
    assert float(tuner.A.detach().std()) == pytest.approx(0.02, rel=0.5)
    with pytest.raises(dw.UserError, match="cannot start at zero"):
        attached("s2-lora[zero=B]")


def test_rank_is_the_number_of_coefficients() -> None:
    _, delta, tuners = attached("s2-lora[rank=5]")
    for count, tuner in enumerate(tuners):
        with torch.no_grad():
            tuner.e[: count + 2].fill_(1)
    assert [rank_of(change(delta, number)) for number in range(3)] == [2, 3, 4]


def test_penalty() -> None:
    """0.5 times the mean over all coefficients: (1 + 3) / (3 * 2)."""
    _, delta, (one, two, _) = attached("s2-lora[rank=2,penalty=0.5]")
    with torch.no_grad():
        one.e[0], two.e[1] = 1, -3
    loss = delta.procedure.loss(torch.tensor(1.0))
    assert float(loss.detach()) == pytest.approx(1 + 0.5 * 4 / 6)
    loss.backward()
    assert one.e.grad.tolist() == pytest.approx([0.5 / 6, 0])
    assert two.e.grad.tolist() == pytest.approx([0, -0.5 / 6])


def test_soft_threshold_by_hand() -> None:
    """0.1 off every |e|: 0.25 -> 0.15, -0.3 -> -0.2, 0.05 -> 0; and the loss has no penalty then."""
    _, delta, (tuner, *_) = attached("s2-lora[rank=3,shrink=0.1]")
    with torch.no_grad():
        tuner.e.copy_(torch.tensor([0.25, -0.3, 0.05]))
    assert float(delta.procedure.loss(torch.tensor(1.0))) == 1
    delta.procedure.begin(dw.Run(steps=10))
    delta.procedure.stepped()
    assert tuner.e.tolist() == pytest.approx([0.15, -0.2, 0])
    assert tuner.e[2].item() == 0


def test_a_huge_threshold_leaves_the_base() -> None:
    model, delta, tuners = attached("s2-lora[rank=4,shrink=100]")
    train(model, delta, 0, 5)
    assert all(float(tuner.e.detach().abs().max()) == 0 for tuner in tuners)
    x = torch.randn(5, 8)
    assert torch.equal(model(x), toy()(x))


def test_small_coefficients_go_at_the_end_and_ranks_are_told() -> None:
    model, delta, tuners = attached("s2-lora[rank=4,penalty=0.2,threshold=0.02]")
    x = torch.randn(64, 8)
    start = float(model(x).sub(torch.cat([x, x.roll(1, dims=1)], dim=1)).square().mean().detach())
    train(model, delta, 0, 30)
    assert float(model(x).sub(torch.cat([x, x.roll(1, dims=1)], dim=1)).square().mean().detach()) < start
    used = [int((tuner.e.detach().abs() > 0.02).sum()) for tuner in tuners]
    assert 0 < sum(used) < 12
    delta.procedure.end()
    assert [int(tuner.e.count_nonzero()) for tuner in tuners] == used
    told = delta.procedure.details()["s2_lora_rank"]
    assert told["steps"] == list(range(1, 31))
    assert {name: ranks[-1] for name, ranks in told["values"].items()} == dict(zip("012", used, strict=True))


def test_merge_leaves_the_shared_factors() -> None:
    model, delta, tuners = attached("s2-lora[rank=4]")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    kept = [parameter.clone() for parameter in delta.parameters()]
    x = torch.randn(5, 8)
    moved = model(x)
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5 * float(moved.detach().abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(kept, delta.parameters(), strict=True))
    assert tuners[0].A is tuners[1].A


@pytest.mark.parametrize("spec", ["s2-lora[rank=4,penalty=0.1]", "s2-lora[rank=4,shrink=0.002]"])
def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(spec: str, tmp_path: Path) -> None:
    model, delta, _ = attached(spec)
    train(model, delta, 0, 30)
    half, stopped, _ = attached(spec)
    train(half, stopped, 0, 13)
    stopped.save(tmp_path, training=True)
    resumed = toy()
    going = dw.load(resumed, tmp_path)
    train(resumed, going, 13, 30)
    for mine, theirs in zip(going.parameters(), delta.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert going.procedure.details() == delta.procedure.details()
    again: Any = going.tuners()
    assert again[0].A is again[1].A


def test_two_learning_rates_and_no_decay() -> None:
    _, delta, _ = attached("s2-lora[rank=4,ratio=0.25]")
    groups = delta.parameter_groups(1e-3, weight_decay=0.1)
    assert {group["lr"]: len(group["params"]) for group in groups} == {1e-3: 3, 2.5e-4: 4}
    assert [group["weight_decay"] for group in groups] == [0, 0]


def test_count_of_whisper_small() -> None:
    """144 matrices of 768 x 768 at rank 32: 2 * 768 * 32 + 144 * 32; A and B are there once."""
    config = hf.WhisperConfig(
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    with torch.device("meta"):
        model = hf.WhisperForConditionalGeneration(config)
    delta = dw.attach(model, "s2-lora", targets="attention,cross_attention")
    assert len(delta.tuners()) == 144
    assert delta.report().trainable == 53_760
    assert sorted(p.numel() for p in delta.parameters())[-2:] == [24_576, 24_576]
    assert len(delta.parameters()) == 146
    assert delta.report().stored_bytes == 4 * 53_760


@pytest.mark.parametrize(("name", "inner"), [("t5-large", 1024), ("t5-3b", 4096), ("t5-11b", 16384)])
def test_counts_of_t5(name: str, inner: int) -> None:
    """q and v of 72 attentions have one shape: r (1024 + H d_h) + 144 r."""
    targets = "attention.q,attention.v,cross_attention.q,cross_attention.v"
    delta = dw.attach(zoo.real(name), "s2-lora[rank=8]", targets=targets)
    assert delta.report().trainable == 8 * (1024 + inner) + 144 * 8
