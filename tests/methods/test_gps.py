"""GPS: rows by hand, the contrastive loss by hand, counts, what the choice depends on and what moves."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import begin, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.calibration import summed_gradients
from deltaworks.methods.selective.gps import GPSProcedure, contrastive_loss, per_row


def gps(model: nn.Module, **options: Any) -> tuple[dw.Delta, GPSProcedure]:
    delta = dw.attach(model, "gps", **options)
    assert isinstance(delta.procedure, GPSProcedure)
    return delta, delta.procedure


def test_rows_by_hand() -> None:
    scores = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, -0.2]]).abs()
    assert per_row("linear", scores, 1).tolist() == [1, 3]  # (0, 1) and (1, 0)
    assert per_row("linear", scores, 2).tolist() == [1, 2, 3, 5]
    assert per_row("linear", scores, 9).tolist() == list(range(6))
    assert per_row("conv1d", scores.t().contiguous(), 1).tolist() == [1, 2]  # stored as [in, out]
    assert per_row("conv2d", scores.view(2, 1, 1, 3), 1).tolist() == [1, 3]


def test_contrastive_loss_by_hand() -> None:
    """Two classes at right angles, each twice: at t = 1 every anchor has -log(e / (e + 2))."""
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]], requires_grad=True)
    loss = contrastive_loss(features, torch.tensor([0, 1, 0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 2)))
    loss.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    together = contrastive_loss(torch.randn(4, 3), torch.zeros(4), temperature=1e9)
    assert float(together) == pytest.approx(math.log(3))


@pytest.mark.parametrize(("name", "connections"), [("vit", 1), ("bert", 3), ("gpt2", 2), ("convnet", 2)])
def test_exactly_k_in_each_row_and_every_bias(name: str, connections: int) -> None:
    model, inputs = zoo.ZOO[name]()
    delta, procedure = gps(model, connections=connections)
    begin(delta, name, inputs)
    total = 0
    for item in delta.attached:
        module = model.get_submodule(item.place.path)
        chosen: Any = item.tuner.chosen
        mask = torch.zeros(module.weight.numel()).index_fill(0, chosen["weight"].index.long(), 1.0)
        mask = mask.view(module.weight.shape)
        rows = mask.t() if item.place.kind == "conv1d" else mask.flatten(1)
        assert rows.sum(1).tolist() == [connections] * len(rows)
        total += connections * len(rows)
        if getattr(module, "bias", None) is not None:
            assert chosen["bias"].values.numel() == len(rows)
            total += len(rows)
    assert sum(parameter.numel() for parameter in delta.parameters()) == total
    assert procedure.details()["gps_kept"] == total
    assert not [item for item in delta.attached if item.place.role == "head" or item.place.kind == "norm"]


def test_frozen_entries_norms_and_head() -> None:
    model, inputs = zoo.ZOO["vit"]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    delta, _ = gps(model, also=["head"])
    begin(delta, "vit", inputs)
    allowed = {
        f"{item.key}.{name}": set(entries.index.tolist())
        for item in delta.attached
        for name, entries in getattr(item.tuner, "chosen", {}).items()
    }
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2, weight_decay=0.1))
    for _ in range(8):
        optimizer.zero_grad()
        delta.procedure.loss(zoo.loss_of("vit", model, inputs)).backward()
        optimizer.step()
    delta.merge(keep_base=False)
    biases = heads = 0
    for key, value in model.named_parameters():
        changed = set((value != before[key]).flatten().nonzero().flatten().tolist())
        if key.startswith("classifier"):
            heads += len(changed)
            continue
        assert changed <= allowed.get(key, set()), key
        if "norm" in key or "position" in key or "cls" in key:
            assert not changed, key
        biases += len(changed) if key.endswith("bias") else 0
    assert heads > 100
    assert biases > 300


def test_the_head_does_not_matter() -> None:
    chosen = []
    for seed in (1, 2):
        model, inputs = zoo.ZOO["vit"]()
        with torch.no_grad():
            model.classifier.weight.normal_(generator=torch.Generator().manual_seed(seed))
        delta, procedure = gps(model, connections=2)
        begin(delta, "vit", inputs)
        assert procedure.contrastive
        chosen.append({key: value for key, value in delta.tensors().items() if key.endswith("index")})
    assert all(torch.equal(value, chosen[1][key]) for key, value in chosen[0].items())
    model, inputs = zoo.ZOO["vit"]()
    delta, procedure = gps(model, connections=2, criterion="loss")
    begin(delta, "vit", inputs)
    assert not procedure.contrastive
    tensors = delta.tensors()
    assert any(not torch.equal(value, tensors[key]) for key, value in chosen[0].items())


def test_gradients_add_up_over_batches() -> None:
    model, inputs = zoo.ZOO["vit"]()
    _, procedure = gps(model)
    halves = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 2), slice(1, 3))]
    parameters = list(procedure.parameters().values())

    def total(batches: list[Any]) -> list[Tensor]:
        run = dw.Run(1, batches, lambda model, batch: zoo.loss_of("vit", model, batch))
        return summed_gradients(model, parameters, run, 99, partial(procedure.criterion, run.loss))[0]

    one, two, both = total(halves[:1]), total(halves[1:]), total(halves)
    assert max(float(gradient.abs().max()) for gradient in both) > 0.1
    for a, b, c in zip(one, two, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_models_without_class_labels_are_ranked_by_their_loss(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    delta, procedure = gps(model)
    begin(delta, name, inputs)
    assert not procedure.contrastive
    assert procedure.details()["gps_batches"] == 1
    assert all(item.place.role != "head" for item in delta.attached)


def test_stored_and_restored(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta, _ = gps(model)
    begin(delta, "bert", inputs)
    disturb(delta)
    trained = sum(parameter.numel() for parameter in delta.parameters())
    assert sum(t.numel() * t.element_size() for t in delta.tensors().values()) == 8 * trained
    delta.save(tmp_path, training=True)
    fresh, _ = zoo.ZOO["bert"]()
    loaded = dw.load(fresh, tmp_path)
    begin(loaded, "bert", inputs)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), zoo.output_of("bert", model, inputs))
    with pytest.raises(dw.UserError, match="batches"):
        gps(zoo.ZOO["bert"]()[0])[1].begin(dw.Run(1))


def test_published_count() -> None:
    """K = 1 for each of 83,712 neurons of ViT-B/16, and as many biases."""
    with torch.device("meta"):
        model = hf.ViTForImageClassification(hf.ViTConfig(num_labels=10))
    delta, _ = gps(model)
    modules = [model.get_submodule(item.place.path) for item in delta.attached]
    neurons, biases = (
        sum(sizes) for sizes in zip(*((m.weight.shape[0], m.bias.numel()) for m in modules), strict=True)
    )
    assert neurons == biases == 83_712
    assert neurons + biases == 167_424
