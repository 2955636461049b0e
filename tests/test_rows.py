"""New tokens: their rows alone are trained and stored, in a tied head too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.rows import EmbeddingRows, LinearRows, Rows, parse

NEW = [64, 65, 66]
ALSO = "embedding.token#64-66"


def grown(family: str) -> tuple[Any, dict[str, Any]]:
    """A model with three tokens more, and inputs that hold them."""
    model, inputs = zoo.ZOO[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)  # type: ignore[operator]
    ids = inputs["input_ids"].clone()
    ids[:, 1], ids[:, 2] = NEW[0], NEW[2]
    return model.eval(), inputs | {"input_ids": ids}


def test_parse() -> None:
    assert parse("head") is None
    assert parse("embedding.token#5, 7-9,6") == ("embedding.token", [5, 6, 7, 8, 9])
    for wrong in ("a#9-7", "a#1,,2", "a#-3"):
        with pytest.raises(dw.UserError, match=r"write them as in 'embedding.token#32000-32003,7'"):
            parse(wrong)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "t5"])
def test_only_the_new_rows_move(family: str, tmp_path: Path) -> None:
    model, inputs = grown(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = zoo.output_of(family, model, inputs)
    delta = dw.attach(model, "lora", rank=2, targets="attention", also=[ALSO])
    assert difference(zoo.output_of(family, model, inputs), base) < 1e-6
    rows = [parameter for name, parameter in delta.named_parameters() if name.endswith(".rows")]
    assert [parameter.shape for parameter in rows] == [(3, zoo.WIDTH)]  # one, whichever modules own the table
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    for _ in range(3):
        zoo.loss_of(family, model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = zoo.output_of(family, model, inputs)
    assert difference(moved, base) > 1e-3

    delta.save(tmp_path)
    fresh, _ = grown(family)
    dw.load(fresh, tmp_path)
    assert difference(zoo.output_of(family, fresh, inputs), moved) < 1e-6
    stored = sum(tensor.numel() for tensor in delta.tensors().values())
    assert stored == sum(parameter.numel() for parameter in delta.parameters())

    delta.merge()
    assert difference(zoo.output_of(family, model, inputs), moved) < 1e-5
    table = model.get_input_embeddings().weight.detach()
    old = before[delta.anatomy.select("embedding.token", {"embedding"})[0].path + ".weight"]
    assert torch.equal(table[:64], old[:64])
    assert torch.equal(table[64:], rows[0].detach())
    if delta.anatomy.tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    delta.unmerge()
    delta.detach()
    assert torch.equal(zoo.output_of(family, model, inputs), base)


def test_rows_by_hand() -> None:
    """Lookups and products with the chosen rows replaced, equal to those of the whole changed weight."""
    model, _ = grown("qwen2")
    delta = dw.attach(model, "lora", rank=2, targets="attention", also=["embedding.token#3,65", "embedding.token#66"])
    kinds = [type(item.tuner) for item in delta.attached if isinstance(item.tuner, Rows)]
    assert kinds == [EmbeddingRows, LinearRows]
    disturb(delta)
    rows = dict(delta.named_parameters())["model.embed_tokens.rows"]
    table = model.get_input_embeddings().weight.detach().clone()
    table[[3, 65, 66]] = rows.detach()
    ids, hidden = torch.tensor([[0, 3, 64, 65], [66, 66, 5, 4]]), torch.randn(2, zoo.WIDTH)
    assert torch.equal(model.get_input_embeddings()(ids), table[ids])
    torch.testing.assert_close(model.lm_head(hidden), hidden @ table.T)
    with torch.no_grad():
        assert torch.equal(delta.attached[-1].tuner.tensor("weight", torch.zeros_like(table))[65], rows[1])
    counts = {row.role: (row.trainable, row.changed) for row in delta.report().rows}
    assert counts["embedding.token"] == (3 * zoo.WIDTH, 3 * zoo.WIDTH)
    assert counts.get("head", (0, 0)) == (0, 0)


def test_two_adapters_have_rows_of_their_own_and_rows_act_beside_lora() -> None:
    model, inputs = grown("qwen2")
    outputs = {}
    for name, seed in (("one", 1), ("two", 2)):
        disturb(dw.attach(model, "lora", rank=2, targets="linear,embedding", also=[ALSO], name=name), seed=seed)
        outputs[name] = zoo.output_of("qwen2", model, inputs)
    assert difference(outputs["one"], outputs["two"]) > 1e-3
    dw.switch(model, "one")
    assert torch.equal(zoo.output_of("qwen2", model, inputs), outputs["one"])
    with dw.rows(model, ["two", "one", "two"]):
        mixed = zoo.output_of("qwen2", model, inputs)
    torch.testing.assert_close(mixed[1], outputs["one"][1])
    torch.testing.assert_close(mixed[2], outputs["two"][2])


def test_a_table_that_scales_what_it_looks_up() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = Scaled(9, 4), nn.Linear(4, 9)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    torch.manual_seed(0)
    model = Bag()
    delta = dw.attach(model, "lora", rank=2, targets="re:out", also=["table#8"], tied=True)
    assert {type(item.tuner) for item in delta.attached if isinstance(item.tuner, Rows)} == {Rows}
    disturb(delta)
    ids = torch.tensor([[1, 8]])
    moved = model(ids)
    delta.merge()
    torch.testing.assert_close(model(ids), moved)


def test_rows_that_are_not_there_are_refused() -> None:
    model, _ = zoo.ZOO["qwen2"]()
    with pytest.raises(
        dw.UserError, match=r"'model.embed_tokens' has no row 66 but 64: call .*resize_token_embeddings"
    ):
        dw.attach(model, "lora", also=[ALSO])
    with pytest.raises(dw.UserError, match="target 'norm' matches only places of kind norm"):
        dw.attach(model, "lora", also=["norm#1"])
    assert not [module for module in model.modules() if "_board" in module.__dict__]
