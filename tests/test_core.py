"""The engine by its own numbers: forms, switching, rows, merging, detaching, copying."""

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import nn

import deltaworks as dw
from deltaworks.core.board import Board, Tap
from deltaworks.core.wrapping import unwrap, wrap


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return zoo.ZOO["llama"]()


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return zoo.output_of("llama", model, inputs).detach()


def test_hand_computed_low_rank_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    delta = dw.attach(model, "lora", rank=1, alpha=2, targets="0")
    with torch.no_grad():
        model[0].weight.zero_()
        delta.attached[0].tuner.A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.attached[0].tuner.B.copy_(torch.tensor([[3.0], [4.0]]))
    assert torch.equal(model[0](torch.eye(2)), torch.tensor([[6.0, 12.0], [8.0, 16.0]]).T)
    delta.merge()
    assert torch.equal(model[0].weight, torch.tensor([[6.0, 12.0], [8.0, 16.0]]))


def test_the_model_stays_the_same_object_of_the_same_classes_with_the_same_names() -> None:
    model, _ = llama()
    layer = model.model.layers[0].self_attn.q_proj
    names = [name for name, _ in model.named_parameters()]
    dw.attach(model, "lora")
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert layer is model.model.layers[0].self_attn.q_proj
    assert [name for name, _ in model.named_parameters() if ".deltas." not in name] == names


def test_active_low_rank_adapters_add_up() -> None:
    model, inputs = llama()
    one = dw.attach(model, "lora", name="one", rank=2)
    two = dw.attach(model, "lora", name="two", rank=3, seed=4)
    disturb(one, seed=1)
    disturb(two, seed=2)
    dw.switch(model, ["one", "two"])
    both = output(model, inputs)
    changes = [{item.key: delta.change(item) for item in delta.attached} for delta in (one, two)]
    one.detach()
    two.detach()
    with torch.no_grad():
        for path in changes[0]:
            weight = model.get_submodule(path).weight
            weight += (changes[0][path] + changes[1][path]).float()
    assert difference(both, output(model, inputs)) < 1e-5


def test_adapters_that_replace_the_weight_cannot_act_together() -> None:
    model, _ = llama()
    dw.attach(model, "lora", name="one", dora=True)
    dw.attach(model, "lora", name="two")
    with pytest.raises(dw.UserError, match="cannot be summed"):
        dw.switch(model, ["one", "two"])


def test_composition_is_one_adapter() -> None:
    model, inputs = llama()
    delta = dw.attach(model, "lora[rank=2, targets='attention.[qv]']+lora[rank=1, targets=mlp]")
    assert len(delta.attached) == 2 * 2 + 2 * 3
    disturb(delta)
    with_both = output(model, inputs)
    delta.merge()
    assert difference(output(model, inputs), with_both) < 1e-5
    other = dw.configure("lora", rank=2) + dw.configure("lora", rank=1, targets="mlp")
    assert str(other) == "lora[rank=2]+lora[targets=mlp, rank=1]"


def test_also_trains_the_head_in_full_and_saves_it(tmp_path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "lora", also=["head"])
    assert sum(p.numel() for n, p in delta.named_parameters() if "masters" in n) == 32 * 4 + 4
    disturb(delta)
    expected = zoo.output_of("bert", model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    with torch.no_grad():
        fresh.classifier.weight.normal_()  # a fresh head is another one each time: it is not part of the base
    dw.load(fresh, tmp_path)
    assert difference(zoo.output_of("bert", fresh, inputs), expected) < 1e-6


def test_merge_for_good_leaves_a_plain_model() -> None:
    model, inputs = llama()
    reference, _ = llama()
    delta = dw.attach(model, "lora")
    disturb(delta)
    expected = output(model, inputs)
    delta.merge(keep_base=False)
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert difference(output(model, inputs), expected) < 1e-5
    with pytest.raises(dw.UserError, match="detached already"):
        delta.detach()


def test_rows_mix_ranks_and_refuse_a_wrong_count() -> None:
    model, inputs = llama()
    for name, rank in (("a", 1), ("b", 5)):
        disturb(dw.attach(model, "lora", name=name, rank=rank, seed=rank), seed=rank)
    expected = []
    for row, name in enumerate(("b", "a", "b")):
        dw.switch(model, name)
        expected.append(output(model, inputs)[row])
    with dw.rows(model, ["b", "a", "b"]):
        mixed = output(model, inputs)
    assert max(difference(mixed[row], expected[row]) for row in range(3)) < 1e-5
    with pytest.raises(dw.UserError, match="names 2 rows"), dw.rows(model, ["a", "b"]):
        output(model, inputs)
    with pytest.raises(dw.UserError, match="no adapter is called 'c'"), dw.rows(model, ["c"]):
        pass


def test_a_third_adapter_elsewhere_does_not_confuse_a_compiled_model() -> None:
    model, inputs = llama()
    for name, targets in (("a", "attention.q"), ("b", "attention.q"), ("c", "mlp")):
        disturb(dw.attach(model, "lora", name=name, targets=targets, seed=len(targets)), seed=ord(name))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("a", "c", "b"):
        dw.switch(model, name)
        assert difference(output(compiled, inputs), output(model, inputs)) < 1e-5


def test_a_tuned_model_can_be_pickled() -> None:
    model, inputs = llama()
    disturb(dw.attach(model, "lora"))
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), inputs), output(model, inputs))


def test_attaching_fails_before_anything_changes() -> None:
    model, _ = llama()
    for arguments, sentence in (
        (("lorra",), "did you mean 'lora'"),
        (("lora[rank=0]",), "at least 1"),
        (("lora[rank=33]",), "rank 33 is larger than"),
        (("lora[targets=nowhere]",), "matches nothing"),
    ):
        with pytest.raises(dw.UserError, match=sentence.replace("[", r"\[")):
            dw.attach(model, *arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("_board" in module.__dict__ for module in model.modules())
    dw.attach(model, "lora")
    with pytest.raises(dw.UserError, match="is there already"):
        dw.attach(model, "lora")
    with pytest.raises(dw.UserError, match="made of letters"):
        dw.attach(model, "lora", name="a.b")


def test_a_merged_adapter_must_be_unmerged_first() -> None:
    model, _ = llama()
    delta = dw.attach(model, "lora")
    delta.merge()
    for action in (delta.merge, lambda: dw.attach(model, "lora", name="x"), lambda: delta.disabled().__enter__()):
        with pytest.raises(dw.UserError, match="merged"):
            action()
    delta.unmerge()
    with pytest.raises(dw.UserError, match="not merged"):
        delta.unmerge()


def test_report_counts_and_ranks() -> None:
    model, _ = llama()
    delta = dw.attach(model, "lora", rank=3, targets="attention.[qv]")
    disturb(delta)
    report = delta.report(ranks=True)
    # q [32, 32], v [16, 32] in two blocks
    assert report.trainable == 2 * 3 * ((32 + 32) + (16 + 32))
    assert report.changed == 2 * (32 * 32 + 16 * 32)
    assert report.stored_bytes == 4 * report.trainable
    assert all(rank == 3 for row in report.rows for rank in row.ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora[dora=true]", "hra", "ba-lora"])
def test_rounding_of_a_weight_made_anew_is_no_change(method: str, dtype: torch.dtype) -> None:
    model, _ = llama()
    delta = dw.attach(model.to(dtype), method, targets="attention.[qv]")
    assert any(bool(delta.change(item).any()) for item in delta.attached)  # type: ignore[union-attr]
    report = delta.report(ranks=True)
    assert (report.changed, {rank for row in report.rows for rank in row.ranks}) == (0, {0})
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=1e-4)
    report = delta.report(ranks=True)
    assert report.changed > 0.99 * 2 * (32 * 32 + 16 * 32)
    assert all(rank > 0 for row in report.rows for rank in row.ranks)


def test_attach_to_a_seven_billion_shape_on_the_meta_device() -> None:
    model = zoo.real("llama-7b")
    delta = dw.attach(model, "lora", rank=64)
    assert sum(parameter.numel() for parameter in delta.parameters()) == 159_907_840


def test_a_tuner_around_a_block_and_around_a_sublayer() -> None:
    from deltaworks.core.forms import Tuner
    from deltaworks.core.registry import Config, option

    class Halved(Tuner):
        def __init__(self, site, config) -> None:
            super().__init__()
            self.share = site.ones(1)

        def around(self, base, x):
            return x + 0.5 * self.share * (base(x) - x)

    @dataclass(kw_only=True)
    class Halving(Config):
        targets: str = option("block", "blocks")
        name: ClassVar[str] = "halving"
        kinds: ClassVar[tuple[str, ...]] = ("block",)
        tuner_class: ClassVar[type] = Halved

    model, inputs = llama()
    kept = [layer.forward for layer in model.model.layers]
    delta = dw.attach(model, Halving())
    assert [item.place.path for item in delta.attached] == ["model.layers.0", "model.layers.1"]
    halved = output(model, inputs)
    delta.detach()

    for layer, forward in zip(model.model.layers, kept, strict=True):
        layer.forward = lambda x, *args, forward=forward, **kwargs: x + 0.5 * (forward(x, *args, **kwargs) - x)
    assert difference(halved, output(model, inputs)) < 1e-6


def test_alpha_follows_the_rank_however_options_are_given() -> None:
    for config in (dw.configure("lora", rank=2), dw.configure("lora[rank=2]"), dw.configure("lora[rank=4]", rank=2)):
        assert config.options()["alpha"] == 2
        assert str(config) == "lora[rank=2]"
    assert str(dw.configure("lora", rank=2, alpha=8)) == "lora[rank=2, alpha=8.0]"


def test_a_watched_sequential_runs_its_own_children_alone() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)
    children, expected = list(model), model(x)
    wrap(model, Board())
    assert torch.equal(model(x), expected)
    assert (len(model), list(model), model[-1]) == (2, children, children[1])
    unwrap(model)
    assert (type(model), list(model)) == (nn.Sequential, children)


def test_a_watched_call_is_noted_where_gradients_are() -> None:
    model, inputs = llama()
    board, tap = Board(), Tap("call", graded=True)
    wrap(model, board)
    model._taps.append(tap)
    with torch.no_grad():
        model(**inputs)
    assert tap.value is None
    found = model(**inputs)
    arguments, keywords, noted = tap.value
    assert (arguments, keywords.keys()) == ((), inputs.keys())
    assert noted is found


def test_running_statistics_belong_to_the_base(tmp_path: Path) -> None:
    """Training moves none of them, so that a saved adapter computes on a fresh base what it computed here."""
    model, inputs = zoo.ZOO["convnet"]()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert before
    delta = dw.attach(model, "lora", targets="conv", also=["head"])
    for mode in (False, True):
        model.train(mode)
        zoo.loss_of("convnet", model, inputs).backward()
    disturb(delta)
    expected = zoo.output_of("convnet", model, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["convnet"]()
    dw.load(fresh, tmp_path)
    assert difference(zoo.output_of("convnet", fresh, inputs), expected) < 1e-6
    twin = copy.deepcopy(model)
    assert torch.equal(zoo.output_of("convnet", twin.train(), inputs), expected)
    delta.detach()
    assert all(module.training and "train" not in module.__dict__ for module in model.modules())
    zoo.output_of("convnet", model, inputs)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
