"""Every method on every model family it runs on: generated from the registry, nothing here names a method."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from conformance import (
    FAMILIES,
    METHODS,
    TEXT,
    attach,
    begin,
    build,
    difference,
    disturb,
    frozen_output,
    held,
    parametrize,
    refusal,
    supported,
    tuned,
)
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.cutting import Cut
from deltaworks.core.replacing import dequantize

PAIRS = supported()
every_pair = parametrize(PAIRS)
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_runs_on_text_models_or_says_why(method: str) -> None:
    refused = {family: sentence for family in FAMILIES if (sentence := refusal(method, family))}
    assert set(TEXT) - set(refused), f"{method} runs on no text model: {refused}"
    for family, sentence in refused.items():
        assert len(sentence) > 20, f"{method} refuses {family} without a reason: {sentence!r}"
        assert "\n" not in sentence


@every_pair
def test_starts_as_the_base_where_it_says_so(method: str, family: str) -> None:
    base = frozen_output(family)
    model, inputs = build(family)
    attach(model, method)
    moved = difference(zoo.output_of(family, model, inputs), base)
    if dw.registry()[method].identity:
        assert moved < 1e-5
    else:
        assert moved > 1e-7, "not an identity by declaration, but nothing moved"


@every_pair
def test_gradients_reach_the_trained_tensors_and_nothing_else(method: str, family: str) -> None:
    model, inputs, delta = tuned(method, family)
    ran: set[int] = set()
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: ran.add(id(m)))
    zoo.loss_of(family, model, inputs).backward()
    trained = {id(parameter) for parameter in delta.parameters()}
    assert trained
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            assert parameter.grad is None, f"{name} of the base got a gradient"
            assert not parameter.requires_grad
    touched = 0.0
    for item in delta.attached:
        for name, parameter in item.tuner.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, f"{item.key}.{name} rests and got a gradient"
            elif parameter.grad is None:
                assert id(model.get_submodule(item.place.path)) not in ran, f"{item.key}.{name} got no gradient"
            else:
                assert parameter.grad.isfinite().all(), f"{item.key}.{name}"
                assert parameter.dtype == torch.float32
                touched += float(parameter.grad.abs().sum())
    assert touched > 0


@every_pair
def test_loss_falls(method: str, family: str) -> None:
    model, inputs = build(family)
    delta = attach(model, method)
    begin(delta, family, inputs, steps=12)
    optimizer = torch.optim.AdamW(delta.parameter_groups(dw.registry()[method].learning_rate))
    first = float(zoo.loss_of(family, model, inputs))
    for _ in range(12):
        loss = delta.procedure.loss(zoo.loss_of(family, model, inputs))
        loss.backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    delta.procedure.end()
    assert float(zoo.loss_of(family, model, inputs)) < first


@every_pair
def test_merged_equals_unmerged_and_a_naive_oracle(method: str, family: str) -> None:
    model, inputs, delta = tuned(method, family)
    before = zoo.output_of(family, model, inputs)
    kept = held(model)
    if limit := delta.limit("merge"):
        with pytest.raises(dw.UserError, match="cannot be merged") as error:
            delta.merge()
        assert limit in str(error.value)
        assert torch.equal(zoo.output_of(family, model, inputs), before)
        return
    if ties(delta):
        with pytest.raises(dw.UserError, match="one tied weight and only one of them is tuned"):
            delta.merge()
        return
    delta.merge()
    assert difference(zoo.output_of(family, model, inputs), before) < 2e-5
    delta.unmerge()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in held(model).items())
    assert torch.equal(zoo.output_of(family, model, inputs), before)
    oracle = naive(family, delta)
    if oracle is not None:
        assert difference(before, oracle) < 2e-5


def ties(delta: dw.Delta) -> bool:
    """Whether the adapter changes one owner of a tied weight and not the others."""
    paths = {place.path for item in delta.attached for place, _ in item.all}
    owners = [{name.rpartition(".")[0] for name in group} for group in delta.anatomy.tied]
    return any(group & paths and not group <= paths for group in owners)


def naive(family: str, delta: dw.Delta) -> Tensor | None:
    """The output of a plain float64 copy of the base with W + change written in by hand."""
    plain, inputs = build(family)
    dequantize(plain)
    plain = plain.double()
    if delta.cut is not None:
        Cut(plain, list(delta.cut.units.values()), delta.cut.removed).apply()
    written: set[int] = set()
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        for item in delta.attached:
            tuner = copy.deepcopy(item.tuner).double()
            module = plain.get_submodule(item.place.path)
            rows = slice(*item.place.part) if item.place.part else slice(None)
            turned = item.place.kind in ("conv1d", "embedding")
            if tuner.gives("tensor"):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if id(parameter) not in written:  # a tied one is written once
                        written.add(id(parameter))
                        parameter.copy_(tuner.tensor(name, parameter.clone()))
                continue
            if tuner.gives("factors") or tuner.gives("weight"):
                weight = module.weight.data.t() if turned else module.weight.data
                matrix = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight
                if tuner.gives("factors"):
                    A, B, scale = tuner.factors()
                    new = matrix[rows] + scale * B @ A
                else:
                    new = tuner.weight(matrix[rows].clone())
                matrix = matrix.clone()
                matrix[rows] = new
                new = matrix.reshape(weight.shape)
                module.weight = nn.Parameter((new.t() if turned else new).contiguous())
            if tuner.gives("bias"):
                bias = getattr(module, "bias", None)
                if bias is None and tuner.bias(None) is None:
                    continue
                if bias is None:
                    return None
                bias = bias.data.clone()
                bias[rows] = tuner.bias(bias[rows].clone())
                module.bias = nn.Parameter(bias)
    return zoo.output_of(family, plain, inputs)


@every_pair
def test_detach_gives_the_base_back_bit_for_bit(method: str, family: str) -> None:
    reference, _ = build(family)
    model, inputs, delta = tuned(method, family)
    zoo.loss_of(family, model, inputs).backward()
    delta.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert list(model.state_dict()) == list(reference.state_dict())
    state, original = held(model), held(reference)
    assert all(torch.equal(state[name], original[name]) for name in state)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert not [n for m in model.modules() for n in m.__dict__ if n.startswith("_entry") or n == "_board"]


@every_pair
def test_disabled_and_deepcopy(method: str, family: str) -> None:
    model, inputs, delta = tuned(method, family)
    base = frozen_output(family)
    moved = zoo.output_of(family, model, inputs)
    assert difference(moved, base) > 1e-6, "the disturbed adapter changes nothing"
    with delta.disabled():
        assert difference(zoo.output_of(family, model, inputs), base) < 1e-6
    twin = copy.deepcopy(model)
    assert torch.equal(zoo.output_of(family, model, inputs), moved)
    assert torch.equal(zoo.output_of(family, twin, inputs), moved)
    disturb(delta, seed=5)
    assert torch.equal(zoo.output_of(family, twin, inputs), moved), "the copy shares tensors with the original"


@every_pair
def test_two_adapters_switch_and_do_not_leak(method: str, family: str) -> None:
    model, inputs, one = tuned(method, family)
    first = zoo.output_of(family, model, inputs)
    two = attach(model, method, name="two", seed=7)
    begin(two, family, inputs)
    disturb(two, seed=2)
    second = zoo.output_of(family, model, inputs)
    assert difference(first, second) > 1e-6
    zoo.loss_of(family, model, inputs).backward()
    assert all(parameter.grad is None for parameter in one.parameters())
    dw.switch(model, "default")
    assert torch.equal(zoo.output_of(family, model, inputs), first)
    dw.switch(model, None)
    assert difference(zoo.output_of(family, model, inputs), frozen_output(family)) < 1e-6
    dw.switch(model, "two")
    assert torch.equal(zoo.output_of(family, model, inputs), second)
    one.detach()
    assert torch.equal(zoo.output_of(family, model, inputs), second)


@every_pair
def test_saved_and_loaded(method: str, family: str, tmp_path: Path) -> None:
    model, inputs, delta = tuned(method, family)
    expected = zoo.output_of(family, model, inputs)
    for training in (False, True):
        delta.save(tmp_path, training=training)
        fresh, _ = build(family)
        loaded = dw.load(fresh, tmp_path)
        assert difference(zoo.output_of(family, fresh, inputs), expected) < 1e-6
        if training:
            saved = dict(delta.named_parameters())
            assert all(torch.equal(value, saved[name]) for name, value in loaded.named_parameters())


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    cases = [
        (method, family) for method, family in PAIRS if family in ("llama", "bert", "t5", "gpt2", "vit", "convnet")
    ]
    for number, (method, family) in enumerate(cases):
        model, inputs, delta = tuned(method, family)
        delta.save(tmp_path / str(number))
        torch.save(zoo.output_of(family, model, inputs).detach(), tmp_path / f"{number}.pt")
    script = (
        "import json, sys, torch, zoo, deltaworks as dw\n"
        "from conformance import difference\n"
        "folder, cases = sys.argv[1], json.loads(sys.argv[2])\n"
        "for number, (method, family) in enumerate(cases):\n"
        "    model, inputs = zoo.ZOO[family]()\n"
        "    dw.load(model, f'{folder}/{number}')\n"
        "    expected = torch.load(f'{folder}/{number}.pt', weights_only=True)\n"
        "    print(difference(zoo.output_of(family, model, inputs), expected))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(cases)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == len(cases)
    wrong = [case for case, value in zip(cases, differences, strict=True) if not value < 1e-6]
    assert not wrong


@parametrize([pair for pair in PAIRS if pair[1] not in zoo.UNTOLD])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs, delta = tuned(method, family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        zoo.loss_of(family, model, inputs).backward()
        gradients.append([p.grad.clone() for p in delta.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * max(scale, 1.0)


@every_pair
def test_bfloat16(method: str, family: str) -> None:
    base = frozen_output(family, dtype=torch.bfloat16)
    model, inputs = build(family, torch.bfloat16)
    delta = attach(model, method)
    assert all(parameter.dtype == torch.float32 for parameter in delta.parameters())
    start = zoo.output_of(family, model, inputs)
    assert start.dtype == base.dtype
    if dw.registry()[method].identity:
        # torch may choose another attention kernel once something before it wants a gradient
        assert difference(start, base) < 0.04
    begin(delta, family, inputs)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-4), betas=(0.9, 0.9))
    before = [p.detach().clone() for p in delta.parameters()]
    for _ in range(2):
        loss = delta.procedure.loss(zoo.loss_of(family, model, inputs))
        assert loss.isfinite()
        loss.backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, delta.parameters(), strict=True))


COMPILED = ("llama",)
COMPILED_SLOWLY = ("gpt2", "bert", "t5", "vit", "plain")


@pytest.mark.parametrize(
    ("method", "family"),
    [pair for pair in PAIRS if pair[1] in COMPILED]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair[1] in COMPILED_SLOWLY],
)
def test_compiles_as_one_graph_and_switching_does_not_compile_again(method: str, family: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs, _ = tuned(method, family)
    names = ["default"]
    if "compile" not in dw.registry()[method].limits:  # a declared limit is about switching
        two = attach(model, method, name="two", seed=7)
        begin(two, family, inputs)
        disturb(two, seed=2)
        names = ["default", "two", "default"]
    expected = {}
    for name in names:
        dw.switch(model, name)
        expected[name] = zoo.output_of(family, model, inputs).detach()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for name in names:
        dw.switch(model, name)
        assert difference(zoo.output_of(family, compiled, inputs), expected[name]) < 1e-5
    assert counter.frame_count == 1


GENERATING = ("llama", "mistral", "qwen2", "gpt2", "t5", "bart")


@parametrize([pair for pair in PAIRS if pair[1] in GENERATING])
def test_generation_with_a_cache_equals_generation_without(method: str, family: str) -> None:
    model, inputs, _ = tuned(method, family)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if not model.config.is_encoder_decoder:  # decoders generate from the right end: pad on the left
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    if limit := dw.registry()[method].limits.get("generate"):
        with pytest.raises(dw.UserError) as error:
            model.generate(**inputs, **settings, use_cache=True)
        assert limit in str(error.value)
        return
    with_cache = model.generate(**inputs, **settings, use_cache=True)
    without = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.scores, without.scores, strict=True):
        keep = a.isfinite() & b.isfinite()
        assert difference(a[keep], b[keep]) < 1e-4


@parametrize([pair for pair in PAIRS if pair[1] != "clip"])
def test_one_adapter_for_each_row(method: str, family: str) -> None:
    """Not for CLIP, whose output compares all rows of a batch with each other."""
    model, inputs, delta = tuned(method, family)
    two = attach(model, method, name="two", seed=7)
    begin(two, family, inputs)
    disturb(two, seed=2)
    names = ["two", None, "default"]
    if limit := delta.limit("rows"):
        with pytest.raises(dw.UserError) as error, dw.rows(model, names):
            zoo.output_of(family, model, inputs)
        assert limit in str(error.value)
        return
    expected = []
    for row, name in enumerate(names):
        dw.switch(model, name)
        expected.append(zoo.output_of(family, model, inputs)[row])
    with dw.rows(model, names):
        mixed = zoo.output_of(family, model, inputs)
    for row in range(len(names)):
        assert difference(mixed[row], expected[row]) < 1e-5


@every_method
def test_stores_little_and_counts_what_it_trains(method: str) -> None:
    model = zoo.real("bert-base")
    try:
        delta = dw.attach(model, method)
    except dw.UserError:
        model = zoo.real("t5-large")
        delta = dw.attach(model, method)
    report = delta.report()
    assert report.trainable == sum(parameter.numel() for parameter in delta.parameters())
    tensors = delta.tensors().values()
    sparse = any(not tensor.is_floating_point() for tensor in tensors)
    assert report.stored_bytes <= (8.2 if sparse else 4.1) * max(report.trainable, 1)
    assert str(report.trainable) in str(report).replace(",", "")


SITE_KINDS = {
    "linear": "plain",
    "conv1d": "gpt2",
    "conv2d": "convnet",
    "embedding": "llama",
    "norm": "bert",
    "parameters": "vit",
    "block": "llama",
}
KINDS = [(method, kind) for method in METHODS for kind in dw.registry()[method].kinds if kind in SITE_KINDS]


@pytest.mark.parametrize(("method", "kind"), KINDS, ids=[f"{method}-{kind}" for method, kind in KINDS])
def test_every_kind_of_site_that_it_claims(method: str, kind: str, tmp_path: Path) -> None:
    family = SITE_KINDS[kind]
    base = frozen_output(family)
    model, inputs = zoo.ZOO[family]()
    options = dw.registry()[method].small
    if "targets" in dw.registry()[method]().options() and dw.registry()[method]().targets:
        places = dw.anatomy(model).select("all", (kind,))
        options = {**options, "targets": [place.path for place in places if place.part is None][:3]}
    nothing = dw.registry()[method].limits.get("nothing")
    if nothing and kind == "parameters":  # here: an embedding's own tensors
        with pytest.raises(dw.UserError, match="has nothing to tune"):
            dw.attach(model, method, **options)
        return
    delta = dw.attach(model, method, **options)
    if dw.registry()[method].identity:
        assert difference(zoo.output_of(family, model, inputs), base) < 1e-5
    begin(delta, family, inputs)
    disturb(delta)
    moved = zoo.output_of(family, model, inputs)
    zoo.loss_of(family, model, inputs).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO[family]()
    dw.load(fresh, tmp_path)
    assert difference(zoo.output_of(family, fresh, inputs), moved) < 1e-6
    if not delta.limit("merge") and not ties(delta):
        delta.merge()
        assert difference(zoo.output_of(family, model, inputs), moved) < 2e-5
        delta.unmerge()
        assert torch.equal(zoo.output_of(family, model, inputs), moved)
