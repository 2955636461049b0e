"""DEFT and ADA-DEFT: the smooth count by hand, its gradient, padding, stacks, gates, and what it does to density."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import begin, disturb
from torch import nn

import deltaworks as dw
from deltaworks.methods.procedures.density import mean_of, smooth_count

EPS = 1e-7
VALUES = torch.tensor([0.0, 0.0, 1e-4, 3e-4, 0.5, -0.2])


def test_smooth_count_by_hand() -> None:
    terms = smooth_count(VALUES, EPS)
    torch.testing.assert_close(terms, torch.tensor([0, 0, 0.09091, 0.47368, 1, 1]), atol=1e-5, rtol=0)
    assert float(terms.mean()) == pytest.approx(0.42743, abs=1e-5)
    assert float((VALUES != 0).float().mean()) == pytest.approx(4 / 6)
    half = smooth_count(VALUES.bfloat16(), EPS)
    assert half.dtype == torch.float32
    assert float(half[2]) == pytest.approx(0.0909, abs=1e-3)


def test_gradient_is_zero_at_zero_and_largest_where_the_formula_says() -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 6001)]).requires_grad_()
    smooth_count(x, EPS).sum().backward()
    assert x.grad is not None
    assert float(x.grad[0]) == 0.0
    assert float(x[x.grad.argmax()].detach()) == pytest.approx((EPS / 3) ** 0.5, rel=0.01)
    assert pytest.approx(1.826e-4, rel=1e-3) == (EPS / 3) ** 0.5


def test_it_lies_below_one_and_tends_to_the_exact_density() -> None:
    activation = F.relu(torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)))
    exact = float((activation != 0).float().mean())
    errors = [abs(float(smooth_count(activation, eps).mean()) - exact) for eps in (1e-1, 1e-3, 1e-5, 1e-9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert float(smooth_count(torch.tensor(1.0), 1e-3)) < 1


def test_mean_leaves_padding_out() -> None:
    values = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert mean_of(values, None).tolist() == [0.75, 0.5]
    assert mean_of(values, torch.tensor([[1, 1], [1, 0]])).tolist() == [0.75, 1.0]
    assert mean_of(values, torch.ones(2, 3)).tolist() == [0.75, 0.5]


def relu_bert() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = zoo.ZOO["bert"]()
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    return model, inputs


def extra(model: nn.Module, delta: dw.Delta, inputs: Any, name: str = "bert") -> float:
    """What the method adds to the loss."""
    loss = zoo.loss_of(name, model, inputs)
    return float((delta.procedure.loss(loss) - loss).detach())


def test_the_loss_gains_the_mean_over_layers_and_samples() -> None:
    model, inputs = relu_bert()
    delta = dw.attach(model, "lora[rank=2]+deft[weight=0.5, eps=1e-3]")
    disturb(delta)
    seen = []
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = extra(model, delta, inputs)
    mask = inputs["attention_mask"].float()
    samples = [(smooth_count(o, 1e-3).mean(-1) * mask).sum(1) / mask.sum(1) for o in seen]
    assert found == pytest.approx(0.5 * float(torch.stack(samples).detach().mean()), abs=1e-6)
    padded = inputs["input_ids"].clone()
    padded[-1, -3:] = 7
    assert extra(model, delta, {**inputs, "input_ids": padded}) == pytest.approx(found, abs=1e-7)
    padded[-1, 1] = 7
    assert extra(model, delta, {**inputs, "input_ids": padded}) != pytest.approx(found, abs=1e-7)


def test_two_stacks_give_the_sum_of_two_means() -> None:
    model, inputs = zoo.ZOO["t5"]()
    delta = dw.attach(model, "lora[rank=2]+deft")
    disturb(delta)
    procedure: Any = getattr(delta.procedure, "members", [delta.procedure])[-1]
    found = extra(model, delta, inputs, "t5")
    layers = procedure.read()
    assert {stack: len(taps) for stack, taps in layers.items()} == {"encoder": 2, "decoder": 2}
    mask = inputs["attention_mask"].float()
    means = []
    for stack, reads in layers.items():
        for read in reads.values():
            count = smooth_count(read, EPS).mean(-1)
            sample = (count * mask).sum(1) / mask.sum(1) if stack == "encoder" else count.mean(1)
            means.append(float(sample.detach().mean()))
    assert found == pytest.approx(sum(means[:2]) / 2 + sum(means[2:]) / 2, abs=1e-6)


def train(spec: str, count: int = 30) -> tuple[nn.Module, dw.Delta, dict[str, Any]]:
    model, inputs = relu_bert()
    delta = dw.attach(model, spec)
    begin(delta, "bert", inputs, steps=count)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    for _ in range(count):
        delta.procedure.loss(zoo.loss_of("bert", model, inputs)).backward()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    delta.procedure.end()
    return model, delta, inputs


def test_no_weight_is_the_host_and_weight_lowers_the_density() -> None:
    _, plain, _ = train("lora[rank=2]")
    _, without, inputs = train("lora[rank=2]+deft[weight=0]")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), without.parameters(), strict=True))
    _, dense, _ = train("lora[rank=2]+deft[weight=1e-12]")
    model, sparse, inputs = train("lora[rank=2]+deft[weight=5, eps=1e-2]")
    before, after = (delta.procedure.details()["deft_density_percent"] for delta in (dense, sparse))
    assert before["steps"] == after["steps"] == list(range(30))
    (before,), (after,) = before["values"].values(), after["values"].values()
    assert before[0] == after[0]
    assert after[-1] < before[-1] - 5
    assert after[-1] < after[0]
    held = [tap.value for taps in sparse.procedure.layers.values() for tap in taps.values()]  # type: ignore[attr-defined]
    assert held == [None] * 2
    with torch.no_grad():
        zoo.loss_of("bert", model, inputs)
    held = [tap.value for taps in sparse.procedure.layers.values() for tap in taps.values()]  # type: ignore[attr-defined]
    assert held == [None] * 2, "nothing is kept of a forward pass without gradients"


def test_gradients_reach_the_host_alone_and_the_same_with_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = relu_bert()
        delta = dw.attach(model.train(), "lora[rank=2]+deft")
        disturb(delta)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        delta.procedure.loss(zoo.loss_of("bert", model, inputs)).backward()
        trained = {id(parameter) for parameter in delta.parameters()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
        gradients.append([p.grad for p in delta.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_it_cannot_see_is_an_error() -> None:
    model, inputs = relu_bert()
    delta = dw.attach(model, "full[targets=pooler]+deft")
    with pytest.raises(dw.UserError, match="nothing of the feed-forward layers that can learn"):
        delta.procedure.loss(zoo.loss_of("bert", model, inputs))
    with pytest.raises(dw.UserError, match=r"has no mlp\.down"):
        dw.attach(zoo.ZOO["convnet"]()[0], "full+deft")


def test_gates_of_one_are_deft_and_gates_of_zero_cut_the_layer() -> None:
    model, inputs = relu_bert()
    plain = dw.attach(model, "lora[rank=2]+deft")
    disturb(plain)
    expected, output = extra(model, plain, inputs), zoo.output_of("bert", model, inputs)
    plain.detach()
    gated = dw.attach(model, "lora[rank=2]+ada-deft")
    lora = [item.tuner for item in gated.attached if item.member == 0]
    for mine, theirs in zip(lora, plain.tuners(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert extra(model, gated, inputs) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(zoo.output_of("bert", model, inputs), output, rtol=1e-6, atol=1e-6)
    gates = [item.tuner for item in gated.attached if item.member == 1]
    with torch.no_grad():
        gates[0].gate.zero_()  # type: ignore[union-attr, operator]
    closed = zoo.output_of("bert", model, inputs)
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda _, args, y: torch.zeros_like(y))
    torch.testing.assert_close(zoo.output_of("bert", model, inputs), closed)
    assert (closed - output).abs().max() > 1e-3


def test_gates_train_close_and_are_counted() -> None:
    model, delta, inputs = train("lora[rank=2]+ada-deft[close=0.99]")
    details = delta.procedure.details()
    assert len(details["ada_deft_gate"]) == 2
    assert all(gate == 0 or abs(gate) >= 0.99 for gate in details["ada_deft_gate"].values())
    expected = zoo.output_of("bert", model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("bert", model, inputs), expected, rtol=1e-5, atol=1e-5)
    gates = [item for item in delta.attached if item.member == 1]
    assert sum(parameter.numel() for item in gates for parameter in item.tuner.parameters()) == 2


def test_resuming_goes_on_with_the_history(tmp_path: Path) -> None:
    _, delta, _ = train("lora[rank=2]+deft", count=3)
    delta.save(tmp_path, training=True)
    fresh, _ = relu_bert()
    loaded = dw.load(fresh, tmp_path)
    assert loaded.procedure.details() == delta.procedure.details()
    assert loaded.procedure.state()["step"] == 3


def test_published_counts() -> None:
    """LoRA r = 8 on T5-Large as without it; ADA-DEFT adds a scalar for each of the 48 feed-forward layers."""
    counts = []
    for spec in ("lora[targets='attention.q,attention.v']", "deft[host='lora[targets=''attention.q,attention.v'']']",
                 "ada-deft[host='lora[targets=''attention.q,attention.v'']']"):  # fmt: skip
        counts.append(dw.attach(zoo.real("t5-large"), spec).report().trainable)
    assert counts == [counts[0], counts[0], counts[0] + 48]
    assert counts[0] == 48 * 2 * 8 * 2048
