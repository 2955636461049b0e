"""ID3: the score by hand, the schedule, what never moves, what is stored, and resuming in the middle."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin
from torch import Tensor, nn

import deltaworks as dw

THETA, GRADIENT = torch.tensor([0.5, -0.1, 0.02, -2.0]), torch.tensor([0.4, -0.3, 0.05, 0.9])


class Slopes(nn.Module):
    """Two tensors whose gradients under the loss ``model(slopes)`` are the slopes themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 1, bias=False)
        self.two = nn.Linear(4, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(THETA)
            self.two.weight.copy_(THETA)
            self.head.weight.fill_(1.0)

    def forward(self, slopes: Tensor) -> Tensor:
        return self.head(self.one(slopes[0]) + self.two(slopes[1]))


def slope_loss(model: nn.Module, slopes: Tensor) -> Tensor:
    return model(slopes).sum()


def slopes(one: Tensor, two: Tensor) -> Tensor:
    return torch.stack([one, two])


def started(
    keep: float, steps: int, batch: Tensor | None = None, model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, dw.Delta, Any]:
    model = model or Slopes()
    delta = dw.attach(model, "id3", keep=keep, targets="one,two", **options)
    batch = slopes(GRADIENT, GRADIENT) if batch is None else batch
    delta.procedure.begin(dw.Run(steps=steps, batches=[batch], loss=slope_loss))
    return model, delta, delta.procedure


def opened(delta: dw.Delta) -> list[list[int]]:
    return [tuner.chosen["weight"].index.tolist() for tuner in delta.tuners()]  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("eps", "exp", "expected", "first"),
    [
        (0.1, 1, (0.6667, 1.5, 0.4167, 0.4286), 1),
        (1e-3, 0, (0.4, 0.3, 0.05, 0.9), 3),
        (1.0, 1, (0.2667, 0.2727, 0.0490, 0.3), 3),
    ],
)
def test_score_by_hand(eps: float, exp: float, expected: tuple[float, ...], first: int) -> None:
    _, delta, procedure = started(1 / 8, 1, slopes(GRADIENT, 0 * GRADIENT), eps=eps, exp=exp)
    torch.testing.assert_close(procedure.scores(THETA, GRADIENT), torch.tensor(expected), atol=1e-4, rtol=0)
    assert opened(delta) == [[first], []]


def test_size_alone_decides_between_equal_gradients_and_competition_is_global() -> None:
    _, delta, _ = started(2 / 8, 1, torch.ones(2, 4), exp=1.0)
    assert opened(delta) == [[2], [2]]  # |0.02| is the smallest of each
    _, delta, _ = started(4 / 8, 1, slopes(0.01 * GRADIENT, GRADIENT), exp=0.0)
    assert opened(delta) == [[], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("count", "steps", "expected"), [(5, 4, [2, 3, 4, 5]), (3, 10, [1, 2] + [3] * 8), (8, 4, [2, 4, 6, 8])]
)
def test_schedule(count: int, steps: int, expected: list[int]) -> None:
    """The remainder comes first; fewer entries than steps; ties (all scores equal) open no more than that."""
    _, delta, procedure = started(count / 8, steps, torch.ones(2, 4), exp=0.0)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    seen, before = [], set[int]()
    for _ in range(steps):
        procedure.loss(slope_loss(delta.model, torch.ones(2, 4))).backward()
        optimizer.step()
        procedure.stepped()
        optimizer.zero_grad()
        now = set(procedure.positions.tolist())
        assert before <= now
        assert len(now) == len(procedure.positions)
        before = now
        seen.append(len(now))
    assert seen == expected
    told = procedure.details()["id3_entries"]
    assert told["steps"] == list(range(1, steps + 1))
    assert [sum(each) for each in zip(*told["values"].values(), strict=True)] == expected


def test_counts_of_ten_over_four() -> None:
    """3, 3, 2, 2."""
    _, _, procedure = started(1.0, 4)
    procedure.pool.values = nn.Parameter(torch.zeros(10))
    type(procedure).count = property(lambda self: 10)
    try:
        totals = []
        for procedure.step in range(4):
            totals.append(procedure.due())
    finally:
        del type(procedure).count
    assert totals == [3, 6, 8, 10]


def test_an_entry_takes_part_in_the_update_of_its_step_and_updates_add_up() -> None:
    """SGD with constant slopes: the entry of step t moves T - t times; in all (T + 1) B / 2 updates."""
    model, delta, procedure = started(1.0, 4, slopes(GRADIENT, 0.5 * GRADIENT), exp=0.0)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(4):
        procedure.loss(slope_loss(model, slopes(GRADIENT, 0.5 * GRADIENT))).backward()
        optimizer.step()
        procedure.stepped()
        optimizer.zero_grad()
    delta.merge()
    moves = [
        (THETA - model.one.weight.detach()[0]) / (0.1 * GRADIENT),
        (THETA - model.two.weight.detach()[0]) / (0.05 * GRADIENT),
    ]
    # sizes .9 .45 | .4 .3 | .2 .15 | .05 .025 open two by two
    torch.testing.assert_close(torch.stack(moves), torch.tensor([[3.0, 3, 1, 4], [2, 2, 1, 4]]), rtol=1e-4, atol=1e-4)
    assert float(sum(move.sum() for move in moves)) == pytest.approx((4 + 1) * 8 / 2, abs=1e-3)


def test_accumulated_gradients_choose_once_and_are_clipped_with_the_rest() -> None:
    """Two backward passes of one step count as their sum; the new entry's gradient stands in ``grad`` already."""
    model, delta, procedure = started(2 / 8, 2, slopes(GRADIENT, 0 * GRADIENT), exp=0.0)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    procedure.loss(slope_loss(model, slopes(GRADIENT, 0 * GRADIENT))).backward()
    optimizer.step()
    procedure.stepped()
    optimizer.zero_grad()
    assert opened(delta) == [[3], []]
    first, second = torch.tensor([1.0, 0, 0, 5]), torch.tensor([-3.0, 1.5, 0, 5])
    for part in (first, second):
        procedure.loss(slope_loss(model, slopes(part, 0 * part))).backward()
    assert delta.parameters()[0].grad is not None
    assert delta.parameters()[0].grad.tolist() == [10.0, -2.0]
    procedure.stepped()
    assert opened(delta) == [[0, 3], []]


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_the_rest_never_moves_and_the_state_is_small(name: str, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO[name]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    delta = dw.attach(model, "id3", keep=0.02)
    begin(delta, name, inputs)
    expected = delta.procedure.count  # type: ignore[attr-defined]
    assert sum(parameter.numel() for parameter in delta.parameters()) == expected
    train(name, model, inputs, delta)
    delta.procedure.end()
    tensors = delta.tensors()
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * expected
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 8 * expected
    tuned = zoo.output_of(name, model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO[name]()
    loaded = dw.load(fresh, tmp_path)
    assert all(torch.equal(loaded.tensors()[key], value) for key, value in tensors.items())
    torch.testing.assert_close(zoo.output_of(name, fresh, inputs), tuned, rtol=1e-6, atol=1e-6)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == expected
    begin(loaded, name, inputs)  # what was loaded is all there is
    assert sum(parameter.numel() for parameter in loaded.parameters()) == expected
    delta.merge(keep_base=False)
    after = dict(model.named_parameters())
    moved = sum(int((after[key] != value).sum()) for key, value in before.items())
    assert 0.8 * expected < moved <= expected


def train(name: str, model: nn.Module, inputs: Any, delta: dw.Delta) -> None:
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3, weight_decay=0.1))
    for _ in range(10):
        delta.procedure.loss(zoo.loss_of(name, model, inputs)).backward()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()


def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    def run(model: nn.Module, inputs: Any, delta: dw.Delta, steps: range) -> None:
        begin(delta, "bert", inputs, steps=8)
        for _ in steps:
            delta.procedure.loss(zoo.loss_of("bert", model, inputs)).backward()
            with torch.no_grad():
                for parameter in delta.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
            delta.procedure.stepped()

    model, inputs = zoo.ZOO["bert"]()
    whole = dw.attach(model, "id3", keep=0.02)
    run(model, inputs, whole, range(8))
    half, _ = zoo.ZOO["bert"]()
    stopped = dw.attach(half, "id3", keep=0.02)
    run(half, inputs, stopped, range(3))
    stopped.save(tmp_path, training=True)
    rest, _ = zoo.ZOO["bert"]()
    going = dw.load(rest, tmp_path)
    run(rest, inputs, going, range(3, 8))
    assert torch.equal(going.parameters()[0], whole.parameters()[0])
    assert torch.equal(going.procedure.positions, whole.procedure.positions)  # type: ignore[attr-defined]
    assert going.procedure.details() == whole.procedure.details()
    told = going.procedure.details()["id3_entries"]["values"]
    assert sum(opened[-1] for opened in told.values()) == whole.procedure.count  # type: ignore[attr-defined]
    state = going.procedure.state()
    for wrong in (state["positions"] + 10**6, state["positions"].repeat(2), state["positions"] - 10**6):
        with pytest.raises(dw.UserError, match="different entries"):
            going.procedure.resume({**state, "positions": wrong})


def test_training_without_begin_or_gradients_is_an_error() -> None:
    delta = dw.attach(model := Slopes(), "id3", targets="one,two", keep=0.5)
    with pytest.raises(dw.UserError, match="before the first step"):
        delta.procedure.loss(torch.zeros(()))
    with pytest.raises(dw.UserError, match=r"needs keep above 0 and Run"):
        delta.procedure.begin(dw.Run(steps=3))
    delta.detach()
    delta = dw.attach(model, "id3", targets="one,two", keep=0.01)
    with pytest.raises(dw.UserError, match="keep above 0"):
        delta.procedure.begin(dw.Run(steps=3, batches=[torch.ones(2, 4)], loss=slope_loss))


def test_published_counts() -> None:
    """DeBERTa-v3-base, 184 M parameters: a budget of 320 K is 0.174 % of them."""
    delta = dw.attach(zoo.real("deberta-v3-base"), "id3", keep=320_000 / 183_831_552 + 1e-9)
    assert delta.report().total == 183_831_552
    assert delta.report().trainable == 320_000
