"""IST: the bandit by hand, damping, what rests stays, the host's checkpoint, and resuming in the middle."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.layers import damped, drawn, layers
from deltaworks.train.measure import step_memory


class Deep(nn.Module):
    """Four blocks and a dropout, which only matters in training."""

    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(zoo.PlainBlock(width, 2 * width) for _ in range(blocks))
        self.drop = nn.Dropout(0.5)
        self.final = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.final(self.drop(x))


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.roll(1, dims=-1)).square().mean()


def start(spec: str, model: nn.Module | None = None) -> tuple[nn.Module, dw.Delta, Any]:
    model = (model or Deep()).eval()
    delta = dw.attach(model, spec)
    procedures = getattr(delta.procedure, "members", [delta.procedure])
    delta.procedure.begin(dw.Run(steps=40, batches=[X, X.flip(0)], loss=loss_of))
    return model, delta, procedures[-1]


def steps(model: nn.Module, delta: dw.Delta, count: int, rate: float = 0.05) -> None:
    optimizer = torch.optim.SGD(delta.parameters(), lr=rate)
    for _ in range(count):
        delta.procedure.loss(loss_of(model, X)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()


def test_update_by_hand() -> None:
    """Losses 2.0, 2.2, 2.1: rewards .13534, .11080, .12246, mean .12286; then layer 2 is the likeliest to train."""
    _, _, procedure = start("lora[rank=2]+ist")
    procedure.update([[0, 1], [1, 2], [0, 3]], [2.0, 2.2, 2.1])
    expected = torch.tensor([0.03015, 0.00102, -0.03015, -0.00102])
    torch.testing.assert_close(procedure.scores, expected, atol=2e-5, rtol=0)
    weights = torch.sigmoid(-procedure.scores)
    assert int(weights.argmax()) == 2
    assert float(weights[2]) == pytest.approx(0.50754, abs=1e-5)


def test_with_equal_scores_every_layer_is_drawn_equally_often() -> None:
    """8 of 32, 10,000 times: chi-square with 31 degrees of freedom below 61.1 (p = .001)."""
    draws = [drawn(torch.sigmoid(torch.zeros(32)), 8, f"0/ist/{k}") for k in range(10_000)]
    assert all(len(set(chosen)) == 8 for chosen in draws)
    counts = Counter(index for chosen in draws for index in chosen)
    variance = 10_000 * 0.25 * 0.75 * 32 / 31
    assert sum((counts[index] - 2500) ** 2 for index in range(32)) / variance < 61.1


def test_scores_move_at_multiples_of_the_interval_but_not_at_the_start() -> None:
    model, delta, procedure = start("lora[rank=2]+ist[interval=4]")
    disturb(delta)
    seen = []
    for _ in range(9):
        seen.append(procedure.scores.clone())
        steps(model, delta, 1, rate=0.0)
    changed = [k for k in range(1, 9) if not torch.equal(seen[k], seen[k - 1])]
    assert not seen[0].any()
    assert changed == [4, 8]
    assert sum(procedure.details()["ist_trained_steps"].values()) == 9
    told = procedure.details()["ist_score"]
    assert told["steps"] == [4, 8]
    assert [values[-1] for values in told["values"].values()] == pytest.approx(procedure.scores.tolist(), rel=1e-5)


def test_only_the_drawn_layers_train_and_the_others_are_bit_identical() -> None:
    model, delta, procedure = start("lora[rank=2]+ist[train=0.5]")
    disturb(delta)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2, weight_decay=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(delta.parameters())
    drawn_sets = set()
    for _ in range(6):
        active = list(procedure.active)
        drawn_sets.add(tuple(active))
        before = [p.detach().clone() for p in delta.parameters()]
        counts = [float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in delta.parameters()]
        loss_of(model, X).backward()
        wanted = {id(p) for index in active for t in list(layers(delta).values())[index] for p in t.parameters()}
        assert {id(p) for p in delta.parameters() if p.grad is not None} == wanted
        optimizer.step()
        for parameter, old, count in zip(delta.parameters(), before, counts, strict=True):
            now = float(optimizer.state[parameter]["step"]) if parameter in optimizer.state else 0.0
            assert (now == count + 1) == (id(parameter) in wanted)
            assert torch.equal(parameter, old) == (id(parameter) not in wanted)
        delta.procedure.stepped()
        optimizer.zero_grad()
    assert len(drawn_sets) > 1
    assert all(len(active) == 2 for active in drawn_sets)


@pytest.mark.parametrize("host", ["lora[rank=2]", "lora[rank=2, dora=true]", "houlsby[width=2]", "ia3", "full"])
def test_damping(host: str) -> None:
    """1 changes nothing, 0 is the model without these tuners, 0.25 of a LoRA is its scale times 0.25."""
    model = Deep().eval()
    base = model(X)
    delta = dw.attach(model, host)
    disturb(delta)
    whole = model(X)
    tuners = [tuner for group in layers(delta).values() for tuner in group]
    outside = [tuner for tuner in delta.tuners() if tuner not in tuners]
    with damped(tuners, 1.0):
        assert torch.equal(model(X), whole)
    with damped([*tuners, *outside], 0.0):
        torch.testing.assert_close(model(X), base, rtol=1e-5, atol=1e-5)
    with damped(tuners[:3], 0.25):
        part = model(X)
    assert not torch.allclose(part, whole, atol=1e-4)
    if host == "lora[rank=2]":
        for tuner in tuners[:3]:
            tuner.scale *= 0.25  # type: ignore[operator, assignment]
        torch.testing.assert_close(model(X), part)
        for tuner in tuners[:3]:
            tuner.scale *= 4  # type: ignore[operator, assignment]
    with pytest.raises(RuntimeError, match="stop"), damped(tuners, 0.25):
        raise RuntimeError("stop")
    assert torch.equal(model(X), whole)


def test_a_probe_has_no_dropout_and_leaves_the_model_as_it_was() -> None:
    model, delta, procedure = start("lora[rank=2]+ist[beta=0]")
    model.train()
    model.final.eval()
    disturb(delta)
    first = procedure.measured([0, 1, 2, 3], X)
    assert first == procedure.measured([0, 1, 2, 3], X)
    assert first == pytest.approx(float(loss_of(Deep().eval(), X).detach()), abs=1e-6)
    assert [module.training for module in (model, model.drop, model.final)] == [True, True, False]
    assert all(tuner.strength == 1.0 for tuner in delta.tuners())


def test_alone_it_stands_on_its_host_and_the_checkpoint_is_the_host_s(tmp_path: Path) -> None:
    model, delta, _ = start("ist[host='lora[rank=2]']")
    disturb(delta)
    expected = model(X)
    plain = Deep().eval()
    dw.attach(plain, "lora[rank=2]").restore(delta.tensors())
    assert torch.equal(plain(X), expected)
    delta.save(tmp_path)
    fresh = Deep().eval()
    assert str(dw.load(fresh, tmp_path).config) == "ist[host='lora[rank=2]']"
    assert torch.equal(fresh(X), expected)
    both = dw.configure("lora[rank=2]+bitfit+ist[beta=0.5]")
    assert [part.name for part in both.parts()] == ["lora", "bitfit", "ist"]
    with pytest.raises(dw.UserError, match=r"stands on no method.*lora\+ist"):
        dw.attach(Deep(), dw.configure("ist+ist"))
    with pytest.raises(dw.UserError, match="nothing in the blocks"):
        dw.attach(Deep(), "full[targets=final]+ist")


def test_it_stands_on_methods_with_procedures_of_their_own() -> None:
    model, delta, procedure = start("adalora[rank=1, interval=1]+ist")
    steps(model, delta, 12)
    assert procedure.step == 12
    assert "adalora_rank" in delta.procedure.details()
    assert "ist_score" in delta.procedure.details()


def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    spec = "lora[rank=2]+ist[interval=3, rate=100]"
    model, whole, _ = start(spec)
    steps(model, whole, 11)
    half, stopped, _ = start(spec)
    steps(half, stopped, 5)
    stopped.save(tmp_path, training=True)
    rest = Deep().eval()
    going = dw.load(rest, tmp_path)
    going.procedure.begin(dw.Run(steps=40, batches=[X, X.flip(0)], loss=loss_of))
    steps(rest, going, 6)
    assert all(torch.equal(a, b) for a, b in zip(going.parameters(), whole.parameters(), strict=True))
    assert going.procedure.details() == whole.procedure.details()
    assert any(any(values) for values in whole.procedure.details()["ist_score"]["values"].values())
    with pytest.raises(dw.UserError, match="not those of 4 layers"):
        going.procedure.resume({"step": 1, "scores": torch.zeros(3), "trained": torch.zeros(3)})


def test_fewer_trained_layers_save_fewer_activations() -> None:
    saved = []
    for share in (1.0, 0.25):
        model, _, _ = start(f"lora[rank=2]+ist[train={share}]", Deep(blocks=8))
        saved.append(step_memory(model, lambda m=model: loss_of(m, X)).saved)
    assert saved[1] < 0.9 * saved[0]


def test_published_counts() -> None:
    """LLaMA-7B, LoRA r = 32 on q, k, v, up, down: 32 * 1,753,088 = 56,098,816, a quarter of it at any moment."""
    targets = "attention.q,attention.k,attention.v,mlp.up,mlp.down"
    delta = dw.attach(zoo.real("llama-7b"), f"lora[rank=32, targets='{targets}']+ist")
    procedure: Any = delta.procedure
    procedure.choose()
    assert sum(p.numel() for p in delta.parameters()) == 56_098_816
    assert sum(p.numel() for p in delta.parameters() if p.requires_grad) == 14_024_704
    assert procedure.part(0.5) == 16


def test_what_it_needs() -> None:
    delta = dw.attach(Deep(), "lora[rank=2]+ist")
    with pytest.raises(dw.UserError, match="measures losses"):
        delta.procedure.begin(dw.Run(steps=3))
    with pytest.raises(dw.UserError, match="yields no batch"):
        delta.procedure.begin(dw.Run(steps=3, loss=loss_of))
