"""LISA: which blocks train and when, what rests stays, the moments, and resuming in the middle."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.layers import drawn, layers

BLOCKS = 6


class Deep(nn.Module):
    """Six blocks between a stem and a readout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.stages = nn.ModuleList(zoo.PlainBlock(8, 16) for _ in range(BLOCKS))
        self.final = nn.LayerNorm(8)
        self.readout = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.readout(self.final(x).mean(1))


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


def start(spec: str, seed: int = 0) -> tuple[nn.Module, dw.Delta, Any]:
    model = Deep()
    delta = dw.attach(model, spec, seed=seed)
    delta.procedure.begin(dw.Run(steps=12))
    return model, delta, delta.procedure


def training(delta: dw.Delta) -> list[int]:
    """The blocks whose tensors ask for gradients, all of them."""
    groups = layers(delta)
    awake = [[p.requires_grad for tuner in tuners for p in tuner.parameters()] for tuners in groups.values()]
    assert all(all(block) or not any(block) for block in awake)
    return [index for index, block in enumerate(awake) if all(block)]


def steps(model: nn.Module, delta: dw.Delta, optimizer: Any, count: int) -> list[list[int]]:
    seen = []
    for _ in range(count):
        seen.append(training(delta))
        delta.procedure.loss(loss_of(model)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    return seen


def test_drawn_blocks_and_what_stands_outside_get_gradients() -> None:
    model, delta, procedure = start("lisa[layers=2, period=3]")
    loss_of(model).backward()
    chosen = procedure.draw(0)
    assert len(set(chosen)) == 2
    for item in delta.attached:
        wanted = item.place.block is None or item.place.block in chosen
        for parameter in item.tuner.parameters():
            assert (parameter.grad is not None) == wanted, item.key
    assert {item.place.path for item in delta.attached if item.place.block is None} == {"stem", "final", "readout"}
    assert sum(parameter.numel() for parameter in delta.parameters()) == sum(p.numel() for p in Deep().parameters())


def test_draws_at_multiples_of_the_period_only_and_by_the_seed() -> None:
    model, delta, procedure = start("lisa[layers=2, period=3]")
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    seen = steps(model, delta, optimizer, 12)
    assert [seen[k : k + 3] for k in range(0, 12, 3)] == [[procedure.draw(k)] * 3 for k in range(0, 12, 3)]
    assert len({tuple(chosen) for chosen in seen}) > 1
    details = procedure.details()
    assert details["lisa_blocks_in_training"]["steps"] == [0, 3, 6, 9]
    assert {name for name, values in details["lisa_blocks_in_training"]["values"].items() if values[1]} == {
        str(index) for index in procedure.draw(3)
    }
    assert details["lisa_trained_steps"] == {
        name: 3 * sum(values) for name, values in details["lisa_blocks_in_training"]["values"].items()
    }
    _, _, same = start("lisa[layers=2, period=3]")
    _, _, other = start("lisa[layers=2, period=3]", seed=1)
    assert [same.draw(step) for step in range(60)] == [procedure.draw(step) for step in range(60)]
    assert [other.draw(step) for step in range(60)] != [procedure.draw(step) for step in range(60)]
    procedure.end()
    assert training(delta) == list(range(BLOCKS))


def test_every_block_is_drawn_equally_often() -> None:
    """2 of 6, 10,000 times: 3333 each; chi-square with 5 degrees of freedom below 20.5 (p = .001)."""
    counts = Counter(index for k in range(10_000) for index in drawn(torch.ones(6), 2, f"0/lisa/{k}"))
    expected = 10_000 * 2 / 6
    # without replacement, a count varies by p (1 - p) and the sum of squares has 5 / 6 * 6 of it
    statistic = sum((counts[index] - expected) ** 2 for index in range(6)) / (expected * (1 - 2 / 6) * 6 / 5)
    assert statistic < 20.5
    assert sum(counts.values()) == 20_000


def test_what_rests_is_bit_identical_with_decay_and_momentum() -> None:
    model, delta, procedure = start("lisa[layers=2, period=4]")
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2, weight_decay=0.1))
    procedure.optimizing(optimizer)
    steps(model, delta, optimizer, 4)
    before = {name: value.clone() for name, value in delta.named_parameters()}
    steps(model, delta, optimizer, 3)
    chosen = procedure.draw(4)
    blocks = {item.key: item.place.block for item in delta.attached}
    for name, value in delta.named_parameters():
        block = next(block for key, block in blocks.items() if name.startswith(f"{key}."))
        moved = not torch.equal(before[name], value)
        assert moved == (block is None or block in chosen), name


def test_moments_are_those_of_what_trains() -> None:
    model, delta, procedure = start("lisa[layers=1, period=2]")
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    procedure.optimizing(optimizer)
    for _ in range(5):
        steps(model, delta, optimizer, 1)
        held = {id(parameter) for parameter in optimizer.state}
        assert not held & {id(parameter) for parameter in delta.resting}
    block = sum(p.numel() for p in zoo.PlainBlock(8, 16).parameters())
    outside = sum(p.numel() for p in Deep().parameters()) - BLOCKS * block
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert moments == outside + block


def test_all_blocks_are_full_fine_tuning() -> None:
    outputs = []
    for spec in (f"lisa[layers={BLOCKS}, period=2]", "full"):
        model, delta, _ = start(spec)
        steps(model, delta, torch.optim.SGD(delta.parameters(), lr=0.05), 4)
        outputs.append(loss_of(model))
    assert torch.equal(*outputs)
    with pytest.raises(dw.UserError, match="layers=7 are more than the 6 blocks"):
        start("lisa[layers=7]")


def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    model, whole, _ = start("lisa[layers=1, period=2]")
    steps(model, whole, torch.optim.SGD(whole.parameters(), lr=0.05), 9)
    half, stopped, _ = start("lisa[layers=1, period=2]")
    steps(half, stopped, torch.optim.SGD(stopped.parameters(), lr=0.05), 5)
    stopped.save(tmp_path, training=True)
    rest = Deep()
    going = dw.load(rest, tmp_path)
    going.procedure.begin(dw.Run(steps=9))
    steps(rest, going, torch.optim.SGD(going.parameters(), lr=0.05), 4)
    assert all(torch.equal(a, b) for a, b in zip(going.parameters(), whole.parameters(), strict=True))
    assert going.procedure.details() == whole.procedure.details()


def test_published_counts() -> None:
    """LLaMA-2-7B, gamma = 2: 2 * 202,383,360 + 2 * 131,072,000 + 4,096 train at a time."""
    delta = dw.attach(zoo.real("llama-7b"), "lisa")
    delta.procedure.begin(dw.Run(steps=100))
    assert sum(parameter.numel() for parameter in delta.parameters()) == 6_738_415_616
    assert sum(p.numel() for p in delta.parameters() if p.requires_grad) == 666_914_816
    assert delta.report().trainable == 6_738_415_616
