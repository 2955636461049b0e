"""One adapter for each row of a batch: exactly what each row has alone, from banks that follow what changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.banks import Bank

EXACT = 1e-12


def wide(family: str, specs: dict[str, str]) -> tuple[nn.Module, dict[str, dw.Delta]]:
    """A model in float64 with disturbed adapters, of which some have parameters in float64 and some in float32."""
    model = zoo.ZOO[family]()[0].double()
    deltas = {}
    for seed, (name, spec) in enumerate(specs.items()):
        deltas[name] = dw.attach(model, spec, name=name, seed=seed)
        disturb(deltas[name], seed=seed)
        if seed % 2:
            model.double()
    return model, deltas


def outputs(family: str, model: nn.Module, rows: int) -> Tensor:
    ids = torch.arange(rows * 6).view(rows, 6) * 7 % (zoo.VOCABULARY - 3) + 3
    return zoo.output_of(family, model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def alone(family: str, model: nn.Module, names: Sequence[str | None]) -> Tensor:
    """Each row as it is where its adapter acts on all."""
    expected = []
    for row, name in enumerate(names):
        dw.switch(model, name)
        expected.append(outputs(family, model, len(names))[row])
    return torch.stack(expected)


def mixed(family: str, model: nn.Module, names: Sequence[str | None]) -> Tensor:
    with dw.rows(model, names):
        return outputs(family, model, len(names))


RANKS = {
    "one": "lora[rank=1,alpha=0.3]",
    "five": "lora[rank=5]",
    "pissa": "lora[rank=2,pissa=true]",
    "loha": "loha[rank=2]",
}
CASES: dict[str, tuple[str, list[str]]] = {
    "ranks": ("llama", [*RANKS.values()]),
    "places": ("llama", ["lora[rank=2,targets='attention.q,attention.v']", "lora[rank=3,targets=mlp]"]),
    "fused": ("gpt2", ["lora[targets=attention.q]", "lora[rank=3]", "lora[rank=1,targets='attention.k,attention.v']"]),
    "forms": ("llama", ["lora[rank=2]", "ia3", "lora[rank=2,dora=true]", "full[targets=mlp]"]),
    "composed": ("llama", ["lora[rank=2,targets=attention]+ia3", "lora[rank=3]", "lora[rank=2]+lora[rank=1]"]),
    "embedding": ("llama", ["lora[rank=2,targets='embedding.token,attention']", "lora[rank=2]"]),
    "tied": ("qwen2", ["lora[rank=2,targets='head,linear']", "lora[rank=3]"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("graded", [False, True])
def test_rows_are_what_each_is_alone(case: str, graded: bool) -> None:
    family, specs = CASES[case]
    model, deltas = wide(family, {f"a{index}": spec for index, spec in enumerate(specs)})
    names = [*deltas, None, *reversed(deltas)]
    with torch.set_grad_enabled(graded):
        expected = alone(family, model, names)
        assert difference(mixed(family, model, names), expected) < EXACT
        assert difference(expected[0], expected[len(deltas)]) > 1e-3  # the adapters are not the base


def test_rows_in_bfloat16_round_as_one_adapter_does() -> None:
    model, deltas = wide("llama", RANKS)
    model.bfloat16()
    names = [*deltas, None]
    with torch.no_grad():
        exact = alone("llama", model.double(), names)
        model.bfloat16()
        apart = difference(alone("llama", model, names), exact)
        assert difference(mixed("llama", model, names), exact) < 1.5 * apart
        model.float()
        exact = alone("llama", model, names)
        with torch.autocast("cpu", torch.bfloat16):
            assert difference(mixed("llama", model, names), exact) < 1.5 * apart


def step(delta: dw.Delta) -> None:
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.05)
    for parameter in delta.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def replaced(delta: dw.Delta) -> None:
    tuner: Any = delta.tuners()[0]
    tuner.A = nn.Parameter(tuner.A.detach() * 2)


def restored(delta: dw.Delta) -> None:
    delta.restore({name: tensor * 1.5 for name, tensor in delta.tensors().items()})


def elsewhere(delta: dw.Delta) -> None:
    delta.drop(delta.attached[0])


@torch.no_grad()
@pytest.mark.parametrize("change", [step, replaced, restored, elsewhere, disturb])
def test_banks_follow_what_changes(change: Any) -> None:
    model, deltas = wide("llama", RANKS)
    names = ["one", "five", None, "one"]
    before = mixed("llama", model, names)
    with patch.object(Bank, "put", autospec=True, side_effect=Bank.put) as put:
        mixed("llama", model, names)
        assert put.call_count == 0
        change(deltas["one"])
        after = mixed("llama", model, names)
        assert put.call_count == len(deltas["one"].paths())  # and none of the other adapters
    assert difference(after, alone("llama", model, names)) < EXACT
    assert difference(after[0], before[0]) > 1e-4
    assert difference(after[1], before[1]) < EXACT


@torch.no_grad()
def test_attaching_and_detaching_reuse_slots() -> None:
    model, deltas = wide("llama", RANKS)
    mixed("llama", model, list(deltas))
    bank: Any = deltas["one"].model.get_submodule(deltas["one"].paths()[0])._bank
    slots = len(bank.A)
    with patch.object(Bank, "put", autospec=True, side_effect=Bank.put) as put:
        for round in range(3):
            deltas["five"].detach()
            deltas["five"] = dw.attach(model, "lora[rank=3,targets=attention]", name="five", seed=round)
            disturb(deltas["five"], seed=round)
            names = ["five", None, "one", "loha"]
            assert difference(mixed("llama", model, names), alone("llama", model, names)) < EXACT
        assert put.call_count == 3 * len(deltas["five"].paths())
    assert len(bank.A) == slots
    for name in ("one", "pissa", "loha"):
        deltas[name].detach()
    assert difference(mixed("llama", model, ["five", None]), alone("llama", model, ["five", None])) < EXACT
    mlp = [module for module in model.modules() if hasattr(module, "_bank") and not len(module.deltas)]
    assert all(module._bank is None for module in mlp)
    deltas["five"].detach()
    assert not any("_bank" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_beside_a_merged_adapter() -> None:
    model, deltas = wide("llama", RANKS)
    names = ["one", None, "loha"]
    before = mixed("llama", model, names)
    deltas["five"].merge()
    merged = mixed("llama", model, names)
    assert difference(merged, alone("llama", model, names)) < EXACT
    assert difference(merged, before) > 1e-3
    with pytest.raises(dw.UserError, match="'five' is merged into the weights"):
        mixed("llama", model, ["five", None])
    deltas["five"].unmerge()
    assert difference(mixed("llama", model, names), before) < EXACT
    deltas["five"].merge(keep_base=False)
    assert difference(mixed("llama", model, names), merged) < EXACT


def test_training_several_adapters_in_one_batch() -> None:
    """Gradients are those of each adapter on its own rows, and an evaluation in the same block sees the step."""
    specs = {"one": "lora[rank=1]", "five": "lora[rank=5]", "scale": "ia3", "dora": "lora[rank=2,dora=true]"}
    model, deltas = wide("gpt2", specs)
    model.double()
    names = ["five", "one", "scale", None, "one", "dora"]
    parameters = [parameter for delta in deltas.values() for parameter in delta.parameters()]
    torch.sin(alone("gpt2", model, names)).sum().backward()
    expected = [parameter.grad for parameter in parameters]
    model.zero_grad()
    model.train()
    optimizer, seen = torch.optim.SGD(parameters, lr=1.0), []
    with dw.rows(model, names):
        for turn in range(2):
            optimizer.zero_grad()
            torch.sin(outputs("gpt2", model, len(names))).sum().backward()
            if turn == 0:
                assert all(difference(p.grad, old) < 1e-10 for p, old in zip(parameters, expected, strict=True))
            optimizer.step()
            with torch.no_grad():
                seen.append(outputs("gpt2", model, len(names)))
    with torch.no_grad():
        assert difference(seen[1], alone("gpt2", model, names)) < EXACT
    assert difference(seen[1], seen[0]) > 1e-3


def test_dropout_acts_in_rows_that_train() -> None:
    model = zoo.ZOO["llama"]()[0]
    deltas = [dw.attach(model, "lora[rank=2,dropout=0.5]", name=name) for name in "ab"]
    for delta in deltas:
        disturb(delta)
    names = ["a", "b", "a"]
    with torch.no_grad():
        still = mixed("llama", model, names)
        model.train()
        assert difference(mixed("llama", model, names), still) > 1e-3
        model.eval()
        assert difference(mixed("llama", model, names), still) == 0


def test_what_is_wrong_changes_nothing() -> None:
    model, deltas = wide("llama", {"low": "lora", "prompt": "prefix"})
    for names, message in ((["low", "slow"], "no adapter is called 'slow'"), (["prompt"], "cannot be one row")):
        with pytest.raises(dw.UserError, match=message), dw.rows(model, names):
            pass
    wrong = pytest.raises(dw.UserError, match="names 3 rows but the batch that reached a layer has 2")
    with wrong, dw.rows(model, ["low", None, "low"]):
        outputs("llama", model, 2)
    assert deltas["low"].board.rows is None
