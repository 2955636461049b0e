"""S2FT: gathered units are co-permuted slices, their gradients, what is kept for the backward pass, and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.selective.s2ft import S2FTTuner


@torch.no_grad()
def permute(mlp: nn.Module, order: list[int]) -> None:
    """The same function with its channels in another order."""
    for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = mlp.get_submodule(name).weight
        weight.copy_(weight.index_select(dimension, torch.tensor(order)))  # type: ignore[operator, union-attr, arg-type]


def order_of(first: list[int], second: list[int], count: int) -> list[int]:
    """The published order: only the first's units, both's, only the second's, the rest."""
    both = [unit for unit in first if unit in second]
    rest = [unit for unit in range(count) if unit not in first + second]
    return [u for u in first if u not in both] + both + [u for u in second if u not in both] + rest


def test_order_of_the_published_code() -> None:
    assert order_of([1, 2], [2, 3], 4) == [1, 2, 3, 0]
    assert order_of([], [2], 3) == [2, 0, 1]


@pytest.mark.parametrize(("role", "rows"), [("mlp.down", False), ("mlp.up", True)])
def test_gathered_units_equal_contiguous_slices_after_the_permutation(role: str, rows: bool) -> None:
    """Three SGD steps of both; the permutation alone leaves the output as it is."""
    model, inputs = zoo.ZOO["llama"]()
    expected = zoo.output_of("llama", model, inputs)
    delta = dw.attach(model, "s2ft", targets=f"{role}@0", channels=0.05)
    tuner: Any = delta.tuners()[0]
    count = len(tuner.index)
    assert count == 3
    twin, _ = zoo.ZOO["llama"]()
    permute(twin.model.layers[0].mlp, order_of([], tuner.index.tolist(), 64))
    torch.testing.assert_close(zoo.output_of("llama", twin, inputs), expected, rtol=1e-5, atol=1e-5)
    path = delta.attached[0].place.path
    weight = twin.get_submodule(path).weight.detach()
    slice_ = torch.zeros_like(weight[:count] if rows else weight[:, :count]).requires_grad_()
    for _ in range(3):
        parts = [weight[:count] + slice_, weight[count:]] if rows else [weight[:, :count] + slice_, weight[:, count:]]
        changed = {f"{path}.weight": torch.cat(parts, dim=0 if rows else 1)}
        torch.func.functional_call(twin, changed, (), inputs).loss.backward()
        zoo.loss_of("llama", model, inputs).backward()
        torch.testing.assert_close(tuner.change.grad, slice_.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for tensor in (tuner.change, slice_):
                tensor.sub_(0.5 * tensor.grad)
                tensor.grad = None
    torch.testing.assert_close(tuner.change, slice_, rtol=1e-4, atol=1e-6)
    expected = zoo.output_of("llama", model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of("llama", model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradients_are_those_of_the_slices_and_of_whole_heads(name: str) -> None:
    targets = "attention.o,attention.v,mlp.down,mlp.up"
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "s2ft", targets=targets, heads=0.5, channels=0.1)
    zoo.loss_of(name, model, inputs).backward()
    dense, inputs = zoo.ZOO[name]()
    zoo.loss_of(name, dense, inputs).backward()
    for item in delta.attached:
        tuner = item.tuner
        assert isinstance(tuner, S2FTTuner)
        module: Any = dense.get_submodule(item.place.path)
        whole = module.weight.grad.t() if item.place.kind == "conv1d" else module.weight.grad
        whole = whole if item.place.part is None else whole[slice(*item.place.part)]
        expected = whole[tuner.index] if tuner.rows else whole[:, tuner.index]
        torch.testing.assert_close(tuner.change.grad, expected, rtol=1e-4, atol=1e-6)
        if item.place.role.startswith("attention"):
            heads = tuner.index.view(-1, 8)
            assert torch.equal(heads, heads[:, :1] + torch.arange(8))
            assert not (heads[:, 0] % 8).any()
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


def test_units_are_drawn_over_all_layers_together_and_by_the_seed() -> None:
    model = zoo.real("llama-7b")
    drawn = [layout(dw.attach(model, "s2ft", name=f"a{k}", seed=seed)) for k, seed in enumerate((0, 0, 1))]
    assert drawn[0] == drawn[1] != drawn[2]
    heads = [len(index) // 128 for path, index in drawn[0].items() if "o_proj" in path]
    channels = [len(index) for path, index in drawn[0].items() if "down_proj" in path]
    assert sum(heads) == 53
    assert len(set(heads)) > 1
    assert sum(channels) == 7045
    assert len(set(channels)) > 1


def layout(delta: dw.Delta) -> dict[str, list[int]]:
    # on the meta device indices are not kept: their sizes tell how many units each layer has
    return {item.key: list(range(item.tuner.index.numel())) for item in delta.attached}  # type: ignore[union-attr, operator]


def test_only_the_chosen_inputs_are_kept_for_the_backward_pass() -> None:
    layer = nn.Sequential(nn.Linear(64, 16, bias=False))
    delta = dw.attach(layer, "s2ft", targets="0", channels=0.125)
    kept: list[int] = []
    own = {layer[0].weight.data_ptr()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.dim() == 2 and tensor.shape[0] == 10:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(10, 64)).sum()
    assert kept == [10 * 8]
    assert sum(p.numel() for p in delta.parameters()) == 16 * 8


def test_fused_adapters_of_disjoint_units_add_up_and_rows_may_differ(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["llama"]()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    one = dw.attach(model, "s2ft", heads=0.25, channels=0.1, name="one")
    disturb(one)
    two = dw.attach(model, "s2ft", heads=0.25, channels=0.1, name="two", seed=5)
    disturb(two, seed=2)
    path = "model.layers.0.mlp.down_proj"
    changes = [delta.change(i) for delta in (one, two) for i in delta.attached if i.place.path == path]
    dw.switch(model, ["one", "two"])
    both = zoo.output_of("llama", model, inputs)
    dw.switch(model, "one")
    first = zoo.output_of("llama", model, inputs)
    dw.switch(model, "two")
    second = zoo.output_of("llama", model, inputs)
    with dw.rows(model, ["two", None, "one"]):
        mixed = zoo.output_of("llama", model, inputs)
    torch.testing.assert_close(mixed[0], second[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[2], first[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both, first)
    for delta in (one, two):
        delta.merge()
        assert delta.merged
        delta.unmerge()
    assert all(torch.equal(value, base[name]) for name, value in base_of(model).items())
    assert len(changes) == 2
    one.save(tmp_path)
    fresh, _ = zoo.ZOO["llama"]()
    dw.load(fresh, tmp_path)
    torch.testing.assert_close(zoo.output_of("llama", fresh, inputs), first, rtol=1e-6, atol=1e-6)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in one.tensors().values())
    assert stored == 4 * one.report().trainable


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".deltas." not in name}


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(dw.UserError, match="raise heads or channels"):
        dw.attach(zoo.ZOO["llama"]()[0], "s2ft", heads=0.1, channels=0.001)
    model, _ = zoo.ZOO["llama"]()
    delta = dw.attach(model, "s2ft", targets="mlp.down", channels=1.0)
    assert delta.report().trainable == 2 * 64 * 32


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama-7b", {}, 56_643_584),
        ("llama3-8b", {"targets": "mlp.down", "channels": 0.03}, 56_369_152),
    ],
)
def test_published_counts(name: str, options: dict[str, Any], expected: int) -> None:
    assert dw.attach(zoo.real(name), "s2ft", **options).report().trainable == expected
