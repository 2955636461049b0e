"""Prefix tuning: counts, export of the MLP, masks, and equality with real keys and values."""

from pathlib import Path

import pytest
import torch
import zoo

import deltaworks as dw
from deltaworks.core.forms import Heads

GENERATORS = ("llama", "mistral", "qwen2", "gpt2", "t5", "t5-gated", "bart")


def total(tensors: object) -> int:
    return sum(tensor.numel() for tensor in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "trained", "stored"),
    [
        ("t5-large", 77_311_488, 4_423_680),
        ("t5-3b", 304_246_272, 17_694_720),
        ("t5-11b", 1_211_985_408, 70_778_880),
    ],
)
def test_counts_of_t5(name: str, trained: int, stored: int) -> None:
    """Three stacks with an MLP of width 512 each, l = 30; stored 2 l L d_kv."""
    delta = dw.attach(zoo.real(name), "prefix")
    assert total(delta.parameters()) == trained
    assert total(delta.tensors().values()) == stored
    assert total(dw.attach(zoo.real(name), "prefix-flat").parameters()) == stored


def test_counts_of_gpt2_medium() -> None:
    assert total(dw.attach(zoo.real("gpt2-medium"), "prefix-flat", length=5).parameters()) == 245_760
    assert total(dw.attach(zoo.real("gpt2-medium"), "prefix-flat", length=10).parameters()) == 491_520
    assert total(dw.attach(zoo.real("gpt2-medium"), "prefix", length=5).tensors().values()) == 245_760


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert", "t5", "bart", "vit", "clip", "whisper"])
@torch.no_grad()
def test_no_length_or_a_zero_gate_is_the_base(name: str) -> None:
    for spec in ("prefix[length=0]", "prefix-flat[length=0]", "prefix-flat[init=gate]"):
        model, inputs = zoo.ZOO[name]()
        before = zoo.output_of(name, model, inputs)
        dw.attach(model, spec)
        torch.testing.assert_close(zoo.output_of(name, model, inputs), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_the_keys_and_values_of_real_tokens_act_as_these_tokens(name: str, attention: str) -> None:
    """Check 3: a cached text copied into the prefix, with the positions of what follows shifted behind it."""
    model, inputs = zoo.ZOO[name]()
    model.set_attn_implementation(attention)
    ids = inputs["input_ids"][:2]
    whole = model(input_ids=ids).logits
    delta = dw.attach(model, "prefix-flat", length=4)
    for row in range(2):
        with delta.disabled():
            cache = model(input_ids=ids[row : row + 1, :4], use_cache=True).past_key_values
        for layer, tuner in enumerate(delta.tuners()):
            tuner.key.copy_(cache.layers[layer].keys[0])
            tuner.value.copy_(cache.layers[layer].values[0])
        positions = torch.arange(4, zoo.LENGTH)[None]
        rest = model(input_ids=ids[row : row + 1, 4:], position_ids=positions).logits
        torch.testing.assert_close(rest[0], whole[row, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert", "roberta", "t5", "bart"])
@torch.no_grad()
def test_no_prefix_column_is_masked_and_padding_stays_masked(name: str, attention: str) -> None:
    """Check 6: a value on one prefix position moves every row; what stands at padding moves nothing."""
    model, inputs = zoo.ZOO[name]()
    model.set_attn_implementation(attention)
    delta = dw.attach(model, "prefix-flat", length=3)
    before = zoo.output_of(name, model, inputs)
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
    after = zoo.output_of(name, model, changed)
    real = inputs["attention_mask"].bool() if before.shape[1] == zoo.LENGTH else torch.ones(before.shape[:2]).bool()
    real = real if before.dim() == 3 else torch.ones(len(before)).bool()
    if name != "roberta":  # it finds padding by its id
        torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=0)
    for position in range(3):
        for tuner in delta.tuners():
            tuner.value[:, position] += 1
        moved = (zoo.output_of(name, model, inputs) - before)[real].abs().amax(-1)
        assert moved.min() > 1e-4
        for tuner in delta.tuners():
            tuner.value[:, position] -= 1


def test_the_first_token_sees_the_prefix_and_no_later_text() -> None:
    """No mask at all: the causal part must survive the extra columns."""
    model, inputs = zoo.ZOO["llama"]()
    dw.attach(model, "prefix-flat", length=3)
    ids = inputs["input_ids"][:1]
    changed = ids.clone()
    changed[0, 5:] = 9
    torch.testing.assert_close(model(input_ids=ids).logits[:, :5], model(input_ids=changed).logits[:, :5])


@pytest.mark.parametrize(
    "spec", ["prefix[length=4,width=16]", "prefix-flat[length=4]", "prefix-flat[length=4,init=gate]"]
)
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_cache_equals_generation_without(name: str, spec: str) -> None:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, spec)
    if delta.config.options().get("init") == "gate":
        for tuner in delta.tuners():
            tuner.gate.data += 0.7
    mask = inputs["attention_mask"].flip(1)
    words = {"input_ids": inputs["input_ids"], "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    words |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": 63}
    cached, plain = (model.generate(**words, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_an_exported_prefix_is_flat_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """Check 4, and a training checkpoint keeps the MLP."""
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "prefix", length=4, width=16)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = zoo.output_of(name, model, inputs)
    delta.save(tmp_path / "export")
    delta.save(tmp_path / "training", training=True)
    flat = dw.load(zoo.ZOO[name]()[0], tmp_path / "export")
    torch.testing.assert_close(zoo.output_of(name, flat.model, inputs), expected, atol=1e-6, rtol=0)
    assert {key.rpartition(".")[2] for key, _ in flat.named_parameters()} == {"key", "value"}
    assert total(flat.parameters()) == total(delta.tensors().values())
    whole = dw.load(zoo.ZOO[name]()[0], tmp_path / "training")
    assert total(whole.parameters()) == total(delta.parameters())
    assert [key for key, _ in whole.named_parameters()] == [key for key, _ in delta.named_parameters()]
    torch.testing.assert_close(zoo.output_of(name, whole.model, inputs), expected, atol=1e-6, rtol=0)
    # a flat one trains on, is saved for training, and comes back flat
    flat.save(tmp_path / "on", training=True)
    again = dw.load(zoo.ZOO[name]()[0], tmp_path / "on")
    torch.testing.assert_close(zoo.output_of(name, again.model, inputs), expected, atol=1e-6, rtol=0)


def test_one_mlp_for_each_stack() -> None:
    model, inputs = zoo.ZOO["t5"]()
    delta = dw.attach(model, "prefix", length=4, width=16)
    assert len({id(tuner.source) for tuner in delta.tuners()}) == 3
    zoo.loss_of("t5", model, inputs).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


def test_wrong_tensors_are_refused() -> None:
    model, _ = zoo.ZOO["llama"]()
    tuner = dw.attach(model, "prefix", length=4, width=16).tuners()[0]
    with pytest.raises(dw.UserError, match="shape"):
        tuner.restore({"key": torch.zeros(2, 5, 8), "value": torch.zeros(2, 4, 8)})
    with pytest.raises(dw.UserError, match="key and value"):
        tuner.restore({"key": torch.zeros(2, 4, 8)})
    assert tuner.source is not None


def test_a_tuner_by_hand() -> None:
    """The prefix attends beside the text: one head of width 1, query 0, values 2 and 4 give 3."""
    heads = Heads(
        torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.zeros(1, 1, 1), 1.0
    )
    grown = heads.prepend(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 4.0))
    weights = torch.softmax(grown.query @ grown.key.mT, -1)
    assert (weights @ grown.value).item() == 3.0
