"""Activations that are computed again: the same gradients from less memory, in any family; none for what is below."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from zoo import ZOO, loss_of

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.train.checkpointing import KINDS, check_kind, checkpointed
from deltaworks.train.measure import step_memory
from deltaworks.train.recipe import Recipe, parse_recipe

METHODS = (
    "lora[rank=2,dropout=0.2]",
    "lora[rank=2,dropout=0.1,dora=true]",
    "prefix[length=3]",
    "prompt[length=3]",
    "houlsby",
    "adalora[rank=2]",
    "oft",
    "lst",
    "deft[weight=1]",
)


def made(family: str, method: str) -> tuple[dw.Delta, Any]:
    model, inputs = ZOO[family]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    if hasattr(model, "config"):
        model.config.use_cache = False  # as it is meanwhile, and so the same kernels
    delta = dw.attach(model.train(), f"{method}+lora[rank=2]" if method.startswith("deft") else method, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in delta.parameters():  # away from the start, where many gradients are 0
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    delta.procedure.begin(dw.Run(4, [inputs], lambda model, batch: loss_of(family, model, batch)))
    return delta, inputs


def gradients(family: str, delta: dw.Delta, inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(3)
    loss = delta.procedure.loss(loss_of(family, delta.model, inputs))
    return loss.detach(), list(torch.autograd.grad(loss, delta.parameters(), allow_unused=True))


def assert_same(family: str, method: str, kind: str) -> None:
    delta, inputs = made(family, method)
    expected, wanted = gradients(family, delta, inputs)
    with checkpointed(delta, kind):
        found, got = gradients(family, delta, inputs)
        with torch.no_grad():
            assert torch.isfinite(loss_of(family, delta.model, inputs))
    assert torch.allclose(found, expected, rtol=1e-6)
    assert any(gradient is not None and gradient.any() for gradient in wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-6, atol=1e-8)
    assert not any("forward" in module.__dict__ for module in delta.model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_activations_that_were_kept(method: str) -> None:
    assert_same("llama", method, "block")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "plain"])
def test_in_every_family(family: str, kind: str) -> None:
    assert_same(family, "lora[rank=2,dropout=0.2]", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "offload"])
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_with_every_method(method: str, kind: str) -> None:
    assert_same("llama", method, kind)


def test_memory_falls_by_what_is_computed_again() -> None:
    delta, inputs = made("llama", "lora[rank=2,targets=linear]")
    batch = {name: value.repeat(1, 6) for name, value in inputs.items()}
    saved: dict[Any, int] = {}
    for kind in (None, *KINDS):
        with checkpointed(delta, kind):
            saved[kind] = step_memory(delta.model, lambda: loss_of("llama", delta.model, batch)).saved
    one = (saved[None] - saved["block"]) / 2  # of two blocks
    assert saved["block"] < 0.5 * saved[None]
    assert saved[None] - saved["selective"] == pytest.approx(one, rel=0.1)
    hidden = 4 * batch["input_ids"].numel() * 32
    assert saved["block"] - saved["offload"] == hidden  # the input of the second block; the first one's needs none


def test_only_what_enters_a_block_goes_to_the_memory_of_the_host() -> None:
    delta, inputs = made("llama", "lora[rank=2]")
    sent: list[tuple[int, ...]] = []

    def away() -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: sent.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    with checkpointed(delta, "offload", away):
        gradients("llama", delta, inputs)
    assert sent == [(*inputs["input_ids"].shape, 32)]


def test_a_cache_is_not_filled_twice() -> None:
    delta, inputs = made("llama", "lora[rank=2]")
    config = delta.model.config
    config.use_cache = True
    with checkpointed(delta, "block"):
        assert delta.model(**inputs).past_key_values is None
    assert config.use_cache is True
    assert delta.model(**inputs).past_key_values is not None


def test_what_makes_no_sense_is_refused() -> None:
    assert parse_recipe({"gradient_checkpointing": True}).gradient_checkpointing == "block"
    assert Recipe().gradient_checkpointing is False
    with pytest.raises(UserError, match="gradient_checkpointing"):
        parse_recipe({"gradient_checkpointing": "blocks"})
    with pytest.raises(UserError, match=r"'blok' is not known.*'block'"):
        check_kind("blok", torch.device("cpu"))
    with pytest.raises(UserError, match=r"the memory of the host.*take gradient_checkpointing=block"):
        check_kind("offload", torch.device("cpu"))
    check_kind("offload", torch.device("cuda"))
    model, _ = ZOO["mlp"]()
    delta = dw.attach(model, "lora[rank=2,targets=*]")
    with pytest.raises(UserError, match="has no blocks to compute again"), checkpointed(delta, "block"):
        pass


@pytest.mark.parametrize("kind", [None, "block"])
@pytest.mark.parametrize(
    "method", ["lora[rank=2,targets=linear@1]", "houlsby[targets=mlp@1]", "lora[rank=2,dora=true,targets=linear@1]"]
)
def test_nothing_flows_back_below_the_lowest_trained_block(method: str, kind: str | None) -> None:
    model, inputs = ZOO["llama"]()
    delta = dw.attach(model.train(), method)
    outputs: list[Tensor] = []
    for path in delta.anatomy.blocks[""]:
        model.get_submodule(path).register_forward_hook(lambda _, __, output: outputs.append(output))
    with checkpointed(delta, kind):
        loss = model(**inputs).loss
        below, above = outputs
        assert below.grad_fn is None
        assert above.grad_fn is not None
        calls: list[str] = []
        for module in model.get_submodule(delta.anatomy.blocks[""][0]).modules():
            module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        loss.backward()
    assert calls == []  # nor is anything there computed again
    assert all(parameter.grad is not None for parameter in delta.parameters())
