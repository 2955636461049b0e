"""SparseAdapter: scores by hand, exactly the count, what composes, what never comes back, what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import begin, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.methods.hybrid.sparse_adapter import SparseProcedure
from deltaworks.methods.selective.entries import largest

ADAPTERS = ("houlsby[init=normal]", "lora", "pfeiffer+lora", "mam[length=4, width=16]", "compacter[width=8]")


def sparse(model: nn.Module, adapter: str = "houlsby[init=normal]", **options: Any) -> tuple[dw.Delta, SparseProcedure]:
    delta = dw.attach(model, "sparse-adapter", adapter=adapter, **options)
    procedure = delta.procedure
    procedure = procedure if isinstance(procedure, SparseProcedure) else procedure.members[-1]  # type: ignore[attr-defined]
    assert isinstance(procedure, SparseProcedure)
    return delta, procedure


def kept(procedure: SparseProcedure) -> int:
    return sum(each.values.numel() for each in procedure.kept.values())


def test_snip_by_hand() -> None:
    """theta = (1, -2, 0.5), g = (0.1, 0.3, -1): scores (0.1, 0.6, 0.5), and two of three keep (0, 1, 1)."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Identity())
    delta, procedure = sparse(model, "lora[rank=1, targets='0']", keep=0.75)
    (tuner,) = delta.tuners()
    with torch.no_grad():
        tuner.B.copy_(torch.tensor([[1.0], [-2.0], [0.5]]))  # type: ignore[union-attr]
        tuner.A.fill_(1e-9)  # type: ignore[union-attr]
    slope = torch.tensor([0.1, 0.3, -1.0]) / 1e-9
    batches = [torch.ones(1, 1)]
    procedure.begin(dw.Run(1, batches, lambda model, x: (model(x)[0] * slope).sum()))
    assert procedure.kept["0.B"].index.tolist() == [1, 2]
    assert tuner.B.detach().tolist() == [[0.0], [-2.0], [0.5]]  # type: ignore[union-attr]


def test_exactly_the_count_over_all_matrices_together() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, procedure = sparse(model, keep=0.3)
    sizes = {f"{i.key}.{n}": p.numel() for i in delta.attached for n, p in i.tuner.named_parameters() if p.dim() > 1}
    begin(delta, "bert", inputs)
    total = sum(sizes.values())
    assert kept(procedure) == total - int(0.7 * total) == procedure.details()["sparse_adapter_kept"]
    densities = {round(each.values.numel() / sizes[name], 3) for name, each in procedure.kept.items()}
    assert len(densities) > 4  # global, not for each matrix
    biases = sum(p.numel() for i in delta.attached for n, p in i.tuner.named_parameters() if n.startswith("b_"))
    assert delta.report().trainable == kept(procedure) + biases
    assert sum(t.numel() * t.element_size() for t in delta.tensors().values()) == 8 * kept(procedure) + 4 * biases


def test_everything_kept_is_the_plain_adapter() -> None:
    outputs = []
    for method, options in (("sparse-adapter", {"keep": 1.0}), ("houlsby", {"init": "normal"})):
        model, inputs = zoo.ZOO["bert"]()
        delta = dw.attach(model, method, **options)
        begin(delta, "bert", inputs)
        disturb(delta)
        outputs.append(zoo.output_of("bert", model, inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_pruned_adapters_of_every_make(adapter: str, tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, procedure = sparse(model, adapter, keep=0.5, score="random")
    begin(delta, "bert", inputs)
    positions = {name: each.index.clone() for name, each in procedure.kept.items()}
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2, weight_decay=0.1))
    losses = []
    for _ in range(8):
        loss = delta.procedure.loss(zoo.loss_of("bert", model, inputs))
        losses.append(loss.item())
        loss.backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    zeros = 0
    for name, each in procedure.kept.items():
        assert torch.equal(each.index, positions[name])
        dense = each.dense().detach().flatten()
        outside = torch.ones_like(dense).index_fill(0, each.index.long(), 0.0).bool()
        assert not dense[outside].any()
        zeros += int(outside.sum())
    assert zeros > 10
    for training in (False, True):
        delta.save(tmp_path, training=training)
        fresh, _ = zoo.ZOO["bert"]()
        dw.load(fresh, tmp_path)
        expected = zoo.output_of("bert", model, inputs)
        torch.testing.assert_close(zoo.output_of("bert", fresh, inputs), expected, rtol=1e-6, atol=1e-6)


def test_the_mlp_behind_a_prefix_stays_whole() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, procedure = sparse(model, "mam[length=4, width=16]", keep=0.5, score="magnitude")
    adapters = [item.tuner for item in delta.attached if item.place.kind == "sublayer"]
    sizes = {id(p): p.numel() for tuner in adapters for p in tuner.parameters() if p.dim() > 1}
    begin(delta, "bert", inputs)
    assert procedure.details()["sparse_adapter_kept"] == sum(sizes.values()) // 2
    assert not any("kv" in name for name in procedure.details()["sparse_adapter_entries"])


def test_adapters_without_matrices_are_refused() -> None:
    with pytest.raises(dw.UserError, match="vera trains no matrices"):
        sparse(zoo.ZOO["bert"]()[0], "vera")


def test_composed_by_plus() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "lora[rank=4]+sparse-adapter[adapter=none, keep=0.5, score=magnitude]")
    begin(delta, "bert", inputs)
    assert 0 < len(delta.procedure.details()["sparse_adapter_entries"]) <= 2 * len(delta.attached)
    delta.merge()
    with pytest.raises(dw.UserError, match="prunes other methods"):
        dw.attach(zoo.ZOO["bert"]()[0], "sparse-adapter[adapter=none]")
    with pytest.raises(dw.UserError, match="adalora changes its own weights"):
        dw.attach(zoo.ZOO["bert"]()[0], "sparse-adapter[adapter=adalora]")
    with pytest.raises(dw.UserError, match="unknown"):
        dw.attach(zoo.ZOO["bert"]()[0], "sparse-adapter[adapter=lorra]")


def test_large_sparse_has_the_same_count() -> None:
    counts = []
    for width, keep in ((8, 1.0), (16, 0.5)):
        model, inputs = zoo.ZOO["bert"]()
        delta, _ = sparse(model, f"houlsby[init=normal, width={width}]", keep=keep)
        begin(delta, "bert", inputs)
        counts.append(sum(p.numel() for n, p in delta.named_parameters() if not n.split(".")[-1].startswith("b_")))
    assert counts[0] == counts[1] == 4 * 2 * 8 * 32


def test_the_same_seed_and_data_give_the_same_mask() -> None:
    def mask(score: str, seed: int, batches: int = 1) -> dict[str, Tensor]:
        model, inputs = zoo.ZOO["bert"]()
        delta = dw.attach(model, "sparse-adapter", score=score, seed=seed, keep=0.5)
        if batches > 1:
            inputs = {**inputs, "labels": 3 - inputs["labels"]}
        begin(delta, "bert", inputs)
        return {key: value for key, value in delta.tensors().items() if key.endswith("index")}

    for score in ("snip", "random", "magnitude"):
        one, again, other = mask(score, 0), mask(score, 0), mask(score, 1)
        assert all(torch.equal(value, again[key]) for key, value in one.items())
        assert any(value.shape != other[key].shape or not torch.equal(value, other[key]) for key, value in one.items())
    data = mask("snip", 0, batches=2)
    assert any(
        value.shape != data[key].shape or not torch.equal(value, data[key]) for key, value in mask("snip", 0).items()
    )


def test_ties_are_kept_to_the_count() -> None:
    """With U = 0 every entry of D has the score 0, and still exactly the count stays."""
    model, inputs = zoo.ZOO["bert"]()
    delta, procedure = sparse(model, "houlsby", keep=0.8)
    total = sum(p.numel() for p in delta.parameters() if p.dim() > 1)
    begin(delta, "bert", inputs)
    assert kept(procedure) == total - int((1 - 0.8) * total)
    assert len(largest(torch.zeros(10), 4)) == 4


def test_bad_positions_are_refused() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, _ = sparse(model, keep=0.5)
    begin(delta, "bert", inputs)
    tensors = delta.tensors()
    key = next(key for key in tensors if key.endswith("kept.D.index"))
    for spoiled in (tensors[key] + 10**6, tensors[key].flip(0), tensors[key][:-1], tensors[key].float()):
        fresh, _ = zoo.ZOO["bert"]()
        with pytest.raises(dw.UserError, match="ascending positions"):
            sparse(fresh, keep=0.5)[0].restore(tensors | {key: spoiled})


def test_published_count() -> None:
    """RoBERTa-base, m = 64, all kept: 24 x 99,136."""
    model = zoo.real("roberta-base")
    delta, _ = sparse(model, "houlsby[init=normal, width=64]", keep=1.0)
    assert delta.report().trainable == 24 * (2 * 64 * 768 + 64 + 768) == 2_379_264
    assert 2_379_264 / sum(p.numel() for p in model.parameters() if p.dim() > 0) == pytest.approx(0.019, abs=0.001)
