"""Experts: a tuner for each matrix of each expert, whichever function of transformers multiplies them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conformance import difference, disturb, one_by_one
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.anatomy import anatomy

WIDTH, HIDDEN, EXPERTS, BLOCKS = 32, 16, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MANY: dict[str, Any] = SIZES | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**MANY, shared_expert_intermediate_size=HIDDEN, decoder_sparse_step=1)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MANY | {"head_dim": 8})),
    # weights stored as [experts, in, out], gates and values in turns, a bias for each expert
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2)
    ),
}
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "labels": IDS}


@functools.cache
def _state(name: str) -> dict[str, Tensor]:
    """Weights of a size at which every expert counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=WIDTH**-0.5)
    return model.state_dict()


def build(name: str, implementation: str = "eager") -> Any:
    model: Any = FAMILIES[name]()
    model.load_state_dict(_state(name))
    model.set_experts_implementation(implementation)
    return model.eval()


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def tuned(name: str, method: str = "lora", **options: Any) -> tuple[Any, dw.Delta]:
    model = build(name)
    delta = dw.attach(model, method, **{"targets": "experts"} | ({"rank": 2} if method == "lora" else {}) | options)
    disturb(delta)
    return model, delta


@pytest.mark.parametrize("method", ["lora", "oft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_expert_computes_with_its_own_changed_matrix(name: str, method: str) -> None:
    model, delta = tuned(name, method, **({} if method == "lora" else {"block": 8}))
    plain = build(name).double()
    turned = name == "gpt-oss"
    with torch.no_grad():
        for item in delta.attached:
            weight = plain.get_submodule(item.place.path)._parameters[item.place.parameter][item.place.expert]
            changed = item.tuner.double().weight(weight.T.clone() if turned else weight.clone())
            weight.copy_(changed.T if turned else changed)
            item.tuner.float()
    moved = logits(model)
    assert difference(moved, logits(plain)) < 1e-5
    assert difference(moved, logits(build(name))) > 0.05
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert difference(logits(model), moved) < 1e-5


def test_products_leave_nothing_of_the_size_of_the_experts() -> None:
    """Neither a copy of the weights is kept for the backward pass, nor is their gradient made there."""
    model, delta = tuned("mixtral", targets="mlp.experts.up,mlp.experts.down")
    disturb(dw.attach(model, "lora", rank=3, targets="experts", name="two"), seed=2)
    dw.switch(model, ["default", "two"])
    moved = logits(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(0 if storage.data_ptr() in own else storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**INPUTS).loss
    loss.backward()
    assert max(kept) < 4 * EXPERTS * WIDTH * HIDDEN
    assert all(parameter.grad is not None for parameter in delta.parameters())
    experts = model.model.layers[0].mlp.experts
    del experts.has_bias  # no class of experts that is known: through the effective weight
    assert difference(logits(model), moved) < 1e-5


def test_names_and_counts() -> None:
    model, delta = tuned("mixtral")
    names = {name for name, _ in delta.named_parameters()}
    assert "model.layers.1.mlp.experts.3.down_proj.A" in names
    assert "model.layers.0.mlp.experts.0.gate_up_proj.B" in names
    assert len(names) == BLOCKS * EXPERTS * 2 * 2
    each = 2 * (WIDTH + 2 * HIDDEN) + 2 * (HIDDEN + WIDTH)
    report = delta.report(ranks=True)
    assert report.trainable == BLOCKS * EXPERTS * each
    assert report.changed == BLOCKS * EXPERTS * (WIDTH * 2 * HIDDEN + HIDDEN * WIDTH)
    assert {(row.role, row.sites) for row in report.rows} == {
        ("mlp.experts.gate_up", BLOCKS * EXPERTS),
        ("mlp.experts.down", BLOCKS * EXPERTS),
    }
    assert all(rank == 2 for row in report.rows for rank in row.ranks)
    drawn = [item.tuner.A for item in delta.attached if item.place.parameter == "down_proj"]
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])  # each expert has its own random numbers
    assert "mlp.experts.down" in str(anatomy(model))


def test_targets() -> None:
    found = anatomy(build("qwen2-moe"))
    matrices = {"matrix"}
    assert len(found.select("experts", matrices)) == BLOCKS * EXPERTS * 2
    assert len(found.select("mlp.experts.down")) == BLOCKS * EXPERTS
    assert [place.name for place in found.select("mlp.experts.3.down_proj")] == [
        f"model.layers.{block}.mlp.experts.3.down_proj" for block in range(BLOCKS)
    ]
    assert len(found.select("experts.down_proj@0")) == EXPERTS
    assert len(found.select(r"re:.*\.experts\.[01]\.gate_up_proj")) == BLOCKS * 2
    assert {place.part for place in found.select("mlp.experts.gate")} == {(0, HIDDEN)}
    assert {place.part for place in found.select("mlp.experts.up")} == {(HIDDEN, 2 * HIDDEN)}
    # attention and what every token passes: the shared expert, but no router
    assert {place.role for place in found.select("linear")} == {
        "attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down",
    }  # fmt: skip
    assert not [place for place in found.select("linear") if place.expert is not None]
    with pytest.raises(dw.UserError, match=r"'mlp.experts.middle' matches nothing.*mlp.experts.gate"):
        found.select("mlp.experts.middle")
    assert not [place for place in anatomy(build("gpt-oss")).places if place.role == "mlp.experts.gate"]


def test_one_half_of_one_expert_and_nothing_else() -> None:
    model = build("mixtral")
    delta = dw.attach(model, "lora", targets=["mlp.experts.up", "experts.2.down_proj@1"], rank=2)
    assert "model.layers.0.mlp.experts.0.gate_up_proj[mlp.experts.up].A" in dict(delta.named_parameters())
    disturb(delta)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    delta.merge()
    assert difference(logits(model), expected) < 1e-5
    after = {name: value for name, value in model.state_dict().items() if ".deltas." not in name}
    moved = {name: (value != before[name]).reshape(len(value), -1).any(1) for name, value in after.items()}
    moved = {name: rows for name, rows in moved.items() if rows.any()}
    first, second = (f"model.layers.{block}.mlp.experts.gate_up_proj" for block in range(2))
    assert set(moved) == {first, second, "model.layers.1.mlp.experts.down_proj"}
    assert torch.equal(model.state_dict()[first][:, :HIDDEN], before[first][:, :HIDDEN])
    assert moved["model.layers.1.mlp.experts.down_proj"].tolist() == [False, False, True, False]
    delta.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


WITHOUT = ("bitfit", "ada-deft", "spt")  # these want a bias, a feed-forward layer, whole layers and norms
METHODS = [name for name, config in dw.registry().items() if "matrix" in config.kinds and name not in WITHOUT]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_changes_a_weight_changes_that_of_an_expert(method: str, tmp_path: Path) -> None:
    config = dw.registry()[method]
    options = dict(config.small) | ({"scale_shift": False} if method == "hut" else {})
    model = build("mixtral")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    base = logits(model)
    targets = "experts" if method != "lorta" else "attention.q,experts"
    delta = dw.attach(model, method, targets=targets, **options)
    if config.identity:
        assert difference(logits(model), base) < 1e-5
    run = dw.Run(steps=9, batches=[INPUTS], loss=lambda m, batch: m(**batch).loss, one_by_one=one_by_one(INPUTS))
    delta.procedure.begin(run)
    disturb(delta)
    moved = logits(model)
    assert difference(moved, base) > 1e-3
    model(**INPUTS).loss.backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.merge()
    assert difference(logits(model), moved) < 2e-5
    delta.unmerge()
    delta.save(tmp_path)
    fresh = build("mixtral")
    dw.load(fresh, tmp_path)
    assert difference(logits(fresh), moved) < 1e-6
    delta.detach()
    assert type(model.model.layers[0].mlp.experts) is type(build("mixtral").model.layers[0].mlp.experts)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_bias_of_each_expert() -> None:
    model = build("gpt-oss")
    delta = dw.attach(model, "bitfit", targets="mlp.experts.down")
    changes = {name: parameter.shape for name, parameter in delta.named_parameters()}
    assert changes == {
        f"model.layers.{block}.mlp.experts.{expert}.down_proj.change": (WIDTH,)
        for block in range(BLOCKS)
        for expert in range(EXPERTS)
    }
    base = logits(build("gpt-oss"))
    disturb(delta)
    moved = logits(model)
    assert difference(moved, base) > 1e-3
    delta.merge(keep_base=False)
    assert difference(logits(model), moved) < 1e-5


def test_what_no_expert_can_hold_is_refused() -> None:
    for method, options, words in (
        ("lora", {"dropout": 0.1}, "has dropout before the layer, but 'model.layers.0.mlp.experts.0.gate_up_proj'"),
        ("hut", {}, "adds a bias, for which the module has no place.*give options without it"),
        ("wara", {"mode": "token"}, "a token would see a later one"),
        ("nera", {}, "matches only places of kind matrix and parameters"),
    ):
        model = build("mixtral")
        with pytest.raises(dw.UserError, match=words):
            dw.attach(model, method, targets="experts", **options)
        assert not [module for module in model.modules() if "_board" in module.__dict__]


def test_training_moves_the_experts_that_tokens_reach(tmp_path: Path) -> None:
    model = build("qwen3-moe", "grouped_mm")
    delta = dw.attach(model, "lora", targets="linear,experts", rank=2)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    losses = []
    for _ in range(8):
        loss = model(**INPUTS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    moved = logits(model)
    with delta.disabled():
        assert difference(logits(model), logits(build("qwen3-moe", "grouped_mm"))) < 1e-6
    model.gradient_checkpointing_enable()
    model.train()
    model(**INPUTS).loss.backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    model.eval()
    delta.save(tmp_path)
    fresh = build("qwen3-moe")
    dw.load(fresh, tmp_path)
    assert difference(logits(fresh), moved) < 1e-5


@pytest.mark.slow
def test_experts_compile_as_one_graph_and_switch_without_another() -> None:
    from torch._dynamo.testing import CompileCounter

    model = build("mixtral", "batched_mm")
    for name in ("one", "two"):
        disturb(dw.attach(model, "lora", targets="experts", rank=2, name=name), seed=len(name + name[-1]))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in ("one", "two"):
        dw.switch(model, name)
        assert difference(compiled(input_ids=IDS).logits, logits(model)) < 1e-5
    assert counter.frame_count == 1
