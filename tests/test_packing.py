"""Sequences side by side in one row lose what each loses alone, or packing is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_decoders import causal, seq2seq
from torch import Tensor, nn
from zoo import ZOO

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.train.batching import Encoded
from deltaworks.train.losses import IGNORED
from deltaworks.train.models import load_model
from deltaworks.train.packing import check_packable, check_packed, is_flat, packed
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.stage import prepare
from deltaworks.train.tasks import make_task

LENGTHS = (11, 3, 7, 5, 16, 2, 9)


def examples(vocabulary: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = length // 3
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def losses_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The losses of all targets, sorted by token and loss so that packing's order does not matter, and their mean."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[labels.flatten() != IGNORED]
    return each.sort().values, each.mean()


def tiny_lm() -> nn.Module:
    return load_model("tiny-lm", "causal").model


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [causal, tiny_lm, lambda: ZOO["gpt2"]()[0]])
def test_each_example_loses_what_it_loses_alone(build: Any, attention: str, flat: bool) -> None:
    model = build().eval()
    model.set_attn_implementation(attention)
    dw.attach(model, "lora[rank=2,targets=linear]")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    rows = examples(40)
    singles = [losses_of(model, {key: torch.tensor([row[key]]) for key in row}) for row in rows]
    batch = packed(rows, 0, flat=flat)
    found, mean = losses_of(model, batch)
    expected = torch.cat([each for each, _ in singles]).sort().values
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5
    gradients = [torch.autograd.grad(loss, one(model)) for loss in (mean, torch.cat([e for e, _ in singles]).mean())]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def one(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_rows_are_as_long_as_the_longest_and_few() -> None:
    batch = packed(examples(40), 0)
    tokens = sum(LENGTHS)
    assert batch["input_ids"].shape == (4, 16)  # 16 | 11 5 | 9 7 | 3 2: 53 tokens, where padding makes 112
    assert int((batch["input_ids"] != 0).sum()) == tokens
    assert batch["position_ids"][1].tolist() == [*range(11), *range(5)]
    assert batch["labels"][1, 11] == IGNORED
    assert int((batch["labels"] != IGNORED).sum()) == sum(length - max(1, length // 3) for length in LENGTHS)
    assert packed(examples(40), 0, flat=True)["input_ids"].shape == (1, 56)
    assert not is_flat(causal())


def test_a_run_is_that_of_the_padded_batches() -> None:
    values = {
        "model": "tiny_decoders:causal", "data": "stdlib-docs", "task": "causal", "limit": 24, "test_limit": 4,
        "max_length": 32, "steps": 3, "batch_size": 8, "method": "lora[rank=2]", "validation": 0,
    }  # fmt: skip
    found = []
    for packing in (False, True):
        stage = prepare(parse_recipe({**values, "packing": packing}))
        delta = stage.attach()
        with stage.lean(delta):
            batch = stage.collate(next(stage.batches()))
            assert ("position_ids" in batch) == packing
            found.append(float(stage.loss(stage.model.eval(), batch).detach()))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserError, match=r"the task is seq2seq: leave it out"):
        check_packable(seq2seq(), make_task("seq2seq", seq2seq().processor))
    task = make_task("causal", causal().processor)
    with pytest.raises(UserError, match=r"MambaForCausalLM takes no position_ids.*leave packing out"):
        check_packable(hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)), task)
    with pytest.raises(UserError, match="BloomForCausalLM takes no position_ids"):
        check_packable(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)), task)
    for method, packs in (("lora[rank=2]", True), ("houlsby", True), ("prompt[length=3]", False)):
        model = causal().eval()
        delta = dw.attach(model, method)
        if packs:
            check_packed(model, str(delta.config))
        else:
            with pytest.raises(UserError, match=r"with prompt.*see each other: leave packing out"):
                check_packed(model, str(delta.config))
