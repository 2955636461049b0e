"""UniPELT: its gates, counts, and what each part is alone."""

import pytest
import torch
import zoo
from torch import nn

import deltaworks as dw
from deltaworks.methods.hybrid.unipelt import Gate, GatedAdapterTuner, GatedLoRATuner, GatedPrefixTuner


def gates_of(delta: dw.Delta) -> list[Gate]:
    return [module for tuner in delta.tuners() for module in tuner.modules() if isinstance(module, Gate)]


def attached(name: str, **options: object) -> tuple[nn.Module, zoo.Inputs, dw.Delta]:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "unipelt", **{"length": 3, **options})
    return model, inputs, delta


def disturb(delta: dw.Delta) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def recorded(delta: dw.Delta) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    for gate in gates_of(delta):
        gate.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    return seen


def test_counts() -> None:
    """BERT-base, l = 10, r = 8, m = 48: 24,576 + 3,076 + 15,360 + 74,544 in each of 12 layers."""
    delta = dw.attach(zoo.real("bert-base"), "unipelt")
    layers = [0] * 12
    for item in delta.attached:
        layers[item.place.block] += sum(parameter.numel() for parameter in item.tuner.parameters())
    assert set(layers) == {117_556}
    assert sum(parameter.numel() for parameter in delta.parameters()) == 1_410_672


def test_a_gate_is_one_number_for_each_example() -> None:
    """Checks 1 and 7."""
    model, inputs, delta = attached("bert")
    seen = recorded(delta)
    model(**inputs)
    assert len(seen) == 2 * 4
    for gate in seen:
        assert gate.shape == (zoo.BATCH, 1, 1)
        assert 0 < gate.min() < gate.max() < 1
        assert (gate[0] - gate[1]).abs() > 1e-5
    with torch.no_grad():
        for module in gates_of(delta):
            module.w.zero_()
            module.c.zero_()
    seen.clear()
    model(**inputs)
    assert all(bool((gate == 0.5).all()) for gate in seen)


@torch.no_grad()
def test_closed_gates() -> None:
    """Check 2: the base with a prefix of zeros, and without a prefix the base itself."""
    for length in (0, 3):
        model, inputs, delta = attached("bert", length=length)
        disturb(delta)
        for gate in gates_of(delta):
            gate.w.zero_()
            gate.c.fill_(-1e4)
        output = zoo.output_of("bert", model, inputs)
        delta.detach()
        if length:
            zeros = dw.attach(model, "prefix-flat", length=length)
            for parameter in zeros.parameters():
                parameter.zero_()
        torch.testing.assert_close(output, zoo.output_of("bert", model, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mistral", "t5", "bart"])
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """Check 3: the padded row and the same text alone."""
    model, inputs, delta = attached(name)
    disturb(delta)
    length = int(inputs["attention_mask"][-1].sum())
    rest = {"decoder_input_ids": inputs["labels"].clamp(min=0)} if name in ("t5", "bart") else {}
    tokens = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    padded = model(**tokens, **rest).logits[-1]
    alone = {key: value[-1:, :length] for key, value in tokens.items()} | {key: v[-1:] for key, v in rest.items()}
    single = model(**alone).logits[0]
    padded = padded[: len(single)] if padded.dim() == 2 else padded
    torch.testing.assert_close(padded, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kept", "method", "options"),
    [
        (GatedLoRATuner, "lora", {"targets": "attention.q,attention.v", "rank": 8, "alpha": 4.0}),
        (GatedAdapterTuner, "pfeiffer", {"reduction": 16, "init": "normal"}),
    ],
)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@torch.no_grad()
def test_a_part_alone_is_the_method_with_the_gate_as_scale(
    name: str, kept: type, method: str, options: dict[str, object]
) -> None:
    """Check 5 with all gates at 0.5: LoRA with s = 1/2, and Pfeiffer's adapter with half its output."""
    model, inputs, delta = attached(name, length=0)
    disturb(delta)
    for tuner in delta.tuners():
        for gate in (module for module in tuner.modules() if isinstance(module, Gate)):
            gate.w.zero_()
            gate.c.fill_(0.0 if isinstance(tuner, kept) else -1e4)
    output = zoo.output_of(name, model, inputs)
    tuners = [tuner for tuner in delta.tuners() if isinstance(tuner, kept)]
    alone = dw.attach(model, method, name="alone", **options)
    for own, gated in zip(alone.tuners(), tuners, strict=True):
        values = dict(gated.named_parameters())
        for key, parameter in own.named_parameters():
            half = method == "pfeiffer" and key in ("U", "b_U")
            parameter.copy_(values[key] * 0.5 if half else values[key])
    torch.testing.assert_close(zoo.output_of(name, model, inputs), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mistral", "t5"])
@torch.no_grad()
def test_a_constant_gate_scales_keys_and_values(name: str, attention: str) -> None:
    """Check 5 for the prefix: with G = 1/2 everywhere both ways to apply it equal a halved prefix."""
    model, inputs, delta = attached(name)
    model.set_attn_implementation(attention)
    for tuner in delta.tuners():
        for gate in (module for module in tuner.modules() if isinstance(module, Gate)):
            gate.w.zero_()
            gate.c.fill_(0.0 if isinstance(tuner, GatedPrefixTuner) else -1e4)
    output = zoo.output_of(name, model, inputs)
    prefixes = [tuner for tuner in delta.tuners() if isinstance(tuner, GatedPrefixTuner)]
    alone = dw.attach(model, "prefix-flat", name="alone", length=3)
    for own, gated in zip(alone.tuners(), prefixes, strict=True):
        own.key.copy_(gated.key / 2)
        own.value.copy_(gated.value / 2)
    torch.testing.assert_close(zoo.output_of(name, model, inputs), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5", "bart"])
def test_causal_gates_see_no_later_token_and_generation_with_a_cache_agrees(name: str) -> None:
    model, inputs, delta = attached(name)
    disturb(delta)
    if name in ("llama", "mistral", "gpt2"):
        changed = inputs["input_ids"].clone()
        changed[:, 6:] = 9
        early = [model(input_ids=ids).logits[:, :6] for ids in (inputs["input_ids"], changed)]
        torch.testing.assert_close(*early, atol=1e-5, rtol=0)
    words = {"input_ids": inputs["input_ids"][:2], "max_new_tokens": 6, "do_sample": False, "eos_token_id": 63}
    words |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**words, use_cache=cache) for cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)


def test_merge_refuses() -> None:
    delta = attached("bert")[2]
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()
    with pytest.raises(dw.UserError, match="mixed batch"), dw.rows(delta.model, ["default"]):
        pass
