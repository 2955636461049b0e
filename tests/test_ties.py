"""Tied and shared weights: one tuner, one change, one tensor in files, whichever modules own the weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw

TIED = ("qwen2", "gpt2", "t5")
SPECS: dict[str, dict[str, Any]] = {
    "lora[rank=2,targets=embedding.token]": {},
    "lora[rank=2,targets=head]": {},
    "lora[rank=2,targets='embedding.token,head,linear']": {},
    "lora[rank=2,targets=head,dora=true]": {},
    "full[targets=embedding.token]": {},
    "lora[rank=2,targets='attention.q,attention.qkv']": {"also": ["head"]},
}


def owners(model: nn.Module, delta: dw.Delta) -> list[Tensor]:
    return [model.get_parameter(name) for name in delta.anatomy.tied[0]]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", TIED)
def test_a_tied_weight_stays_tied(family: str, spec: str, tmp_path: Path) -> None:
    if "attention.qkv" in spec:
        spec = "lora[rank=2,targets=attention]"
    options = SPECS.get(spec, {"also": ["head"]})
    model, inputs = zoo.ZOO[family]()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    delta = dw.attach(model, spec, **options)
    disturb(delta)
    moved = zoo.output_of(family, model, inputs)
    zoo.loss_of(family, model, inputs).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in delta.parameters())  # type: ignore[union-attr]

    delta.merge()
    assert difference(zoo.output_of(family, model, inputs), moved) < 2e-6
    assert len({id(owner) for owner in owners(model, delta)}) == 1
    delta.unmerge()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if ".deltas." not in name)
    assert len({id(owner) for owner in owners(model, delta)}) == 1

    delta.save(tmp_path / "adapter")
    fresh, _ = zoo.ZOO[family]()
    loaded = dw.load(fresh, tmp_path / "adapter")
    assert difference(zoo.output_of(family, fresh, inputs), moved) == 0
    assert loaded.tied

    delta.merge(keep_base=False)
    model.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    assert difference(zoo.output_of(family, again, inputs), moved) < 2e-6


def test_one_change_of_one_weight() -> None:
    """Looked up and multiplied with W + s B A, whichever owner is named; both named are one."""
    for targets in ("embedding.token", "head", "embedding.token,head"):
        model, _ = zoo.ZOO["qwen2"]()
        delta = dw.attach(model, "lora", targets=targets, rank=2)
        disturb(delta)
        (item,) = delta.attached
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        factors = item.tuner.factors()
        change = factors.B @ factors.A
        change = change.T if item.place.kind == "embedding" else change
        hidden, ids = torch.randn(2, zoo.WIDTH), torch.arange(5)
        torch.testing.assert_close(model.get_input_embeddings()(ids), (table + change)[ids])  # type: ignore[operator]
        torch.testing.assert_close(model.lm_head(hidden), hidden @ (table + change).T)  # type: ignore[operator]
        assert delta.report().trainable == 2 * (zoo.VOCABULARY + zoo.WIDTH)
        assert delta.report().changed == zoo.VOCABULARY * zoo.WIDTH
        assert len(delta.tensors()) == 2
        twin = copy.deepcopy(model)
        disturb(delta, seed=3)
        torch.testing.assert_close(twin.lm_head(hidden), hidden @ (table + change).T)  # type: ignore[operator]
        delta.detach()
        assert type(model.lm_head) is nn.Linear


def test_full_training_counts_a_tied_weight_once() -> None:
    model, _ = zoo.ZOO["qwen2"]()
    delta = dw.attach(model, "full", targets="embedding.token,head")
    disturb(delta)
    report = delta.report()
    assert report.trainable == report.changed == zoo.VOCABULARY * zoo.WIDTH
    assert report.stored_bytes == 4 * report.trainable


def test_a_linear_probe_leaves_the_features() -> None:
    model, _ = zoo.ZOO["gpt2"]()
    table = model.get_input_embeddings()(torch.arange(5))  # type: ignore[operator]
    delta = dw.attach(model, "head")
    disturb(delta)
    assert torch.equal(model.get_input_embeddings()(torch.arange(5)), table)  # type: ignore[operator]
    with pytest.raises(dw.UserError, match="one tied weight and only one of them is tuned"):
        delta.merge()


def test_rows_of_a_batch_and_switching() -> None:
    model, inputs = zoo.ZOO["qwen2"]()
    outputs = {}
    for name, seed in (("one", 1), ("two", 2)):
        disturb(dw.attach(model, "lora", targets="head", rank=2, name=name), seed=seed)
        outputs[name] = zoo.output_of("qwen2", model, inputs)
    base = zoo.output_of("qwen2", zoo.ZOO["qwen2"]()[0], inputs)
    with dw.rows(model, ["one", None, "two"]):
        mixed = zoo.output_of("qwen2", model, inputs)
    for row, expected in enumerate((outputs["one"], base, outputs["two"])):
        torch.testing.assert_close(mixed[row], expected[row])
    dw.switch(model, "one")
    assert torch.equal(zoo.output_of("qwen2", model, inputs), outputs["one"])
    dw.switch(model, None)
    assert torch.equal(zoo.output_of("qwen2", model, inputs), base)


@pytest.mark.slow
def test_twins_compile_as_one_graph_and_switch_without_another() -> None:
    from torch._dynamo.testing import CompileCounter

    model, inputs = zoo.ZOO["qwen2"]()
    for name, seed in (("one", 1), ("two", 2)):
        disturb(dw.attach(model, "lora", targets="embedding.token", rank=2, name=name), seed=seed)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in ("one", "two"):
        dw.switch(model, name)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1


# ---- layers that share weights --------------------------------------------------------------------------


class Shared(nn.Module):
    """Three blocks of which the first two share their weights. Shapes: [batch, length, 32] in and out."""

    def __init__(self, modules: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second, third = (zoo.PlainBlock(32, 64) for _ in range(3))
        if modules:
            second = first
        else:
            for path, module in second.named_modules():
                for name, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, name, getattr(first.get_submodule(path), name))
        self.blocks = nn.ModuleList([first, second, third])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("modules", [True, False], ids=["one module twice", "one parameter in two modules"])
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "full", "oft", "hut"])
def test_layers_that_share_weights_share_their_change(method: str, modules: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    model, alone = Shared(modules).eval(), Shared(True).eval()
    base = model(x)
    config = dw.registry()[method]
    options = dict(config.small) | {"targets": "linear"}
    delta, reference = dw.attach(model, method, **options), dw.attach(alone, method, **options)
    assert sum(p.numel() for p in delta.parameters()) == sum(p.numel() for p in reference.parameters())
    assert list(delta.tensors()) == list(reference.tensors())
    assert delta.report().changed == reference.report().changed
    disturb(delta)
    disturb(reference)
    moved = model(x)
    assert difference(moved, base) > 1e-3
    assert difference(alone(x), moved) < 1e-5
    delta.merge()
    assert difference(model(x), moved) < 1e-5
    first, second = model.blocks[0], model.blocks[1]
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=False))
    delta.unmerge()
    delta.save(tmp_path)
    delta.detach()
    assert torch.equal(model(x), base)
    dw.load(model, tmp_path)
    assert difference(model(x), moved) < 1e-6


def test_albert_runs_one_layer_many_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4}
    config = hf.AlbertConfig(**sizes, intermediate_size=64, num_hidden_layers=3, max_position_embeddings=16)
    model: Any = hf.AlbertForMaskedLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    delta = dw.attach(model, "lora", rank=2, targets="linear,embedding.token")
    assert delta.report().trainable == 2 * (4 * (32 + 32) + 2 * (32 + 64) + (64 + 16))
    disturb(delta)
    moved = model(input_ids=ids).logits
    delta.merge()
    assert difference(model(input_ids=ids).logits, moved) < 1e-5
    assert model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
