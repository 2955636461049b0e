"""What the generated suite needs: which method runs on which family, and how a tuned model is made."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
from quantizing import quantize
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.delta import Delta
from deltaworks.core.quantized import storages

QUANTIZED = {"llama-nf4": ("llama", "nf4"), "bert-int8wo": ("bert", "int8wo"), "t5-int4wo": ("t5", "int4wo")}
"""Families with quantized linears: the member of the zoo and the format."""
FAMILIES = (*zoo.ZOO, *QUANTIZED)
TEXT = ("llama", "mistral", "qwen2", "gpt2", "bert", "roberta", "t5", "t5-gated", "bart")
METHODS = tuple(dw.registry())
QUICK = ("lora-llama-nf4", "hut-llama-nf4", "houlsby-llama-nf4", "ia3-bert-int8wo")
"""What `make test` runs on quantized families: a method of each form."""
MET_BY_ALL = ("llama", "gpt2", "bert", "t5-gated", "convnet", "plain")
"""Families that have, between them, every kind of site, both layouts of a linear and a model of no known family."""


def attach(model: nn.Module, method: str, *, name: str = "default", seed: int = 0) -> Delta:
    """The method with options that suit tiny models."""
    return dw.attach(model, method, name=name, seed=seed, **dw.registry()[method].small)


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh model of a family and its inputs, the same values at each call."""
    plain, form = QUANTIZED.get(family, (family, ""))
    model, inputs = cast(*zoo.ZOO[plain](), dtype)
    return (quantize(model, form) if form else model), inputs


@functools.cache
def tried(method: str, family: str) -> str | int:
    """The largest number of the forms that a method has on a family, or the sentence with which it refuses it."""
    if family in QUANTIZED:
        return dw.registry()[method].limits.get("quantized") or tried(method, QUANTIZED[family][0])
    model, _ = zoo.ZOO[family]()
    try:
        return max(tuner.form() for tuner in attach(model, method).tuners())
    except dw.UserError as error:
        return str(error)
    except Exception:  # a fault of the method: its tests shall run and show it
        return 3


def refusal(method: str, family: str) -> str | None:
    """The sentence with which a method refuses a family, or None where it runs."""
    found = tried(method, family)
    return found if isinstance(found, str) else None


def supported() -> list[tuple[str, str]]:
    return [(method, family) for method in METHODS for family in FAMILIES if refusal(method, family) is None]


def parametrize(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """One test for each pair of a method and a family.

    A change of weights meets the other families in `make test-all` alone, where another method of its branch of the
    taxonomy meets them in `make test`: which weights there are is not its business.
    """
    first = {config.family: name for name, config in reversed(dw.registry().items())}
    leads = {method for method in METHODS if first[dw.registry()[method].family] == method}
    cases = []
    for method, family in pairs:
        slow = family not in MET_BY_ALL and method not in leads and tried(method, family) != 3
        slow = f"{method}-{family}" not in QUICK if family in QUANTIZED else slow
        cases.append(pytest.param(method, family, id=f"{method}-{family}", marks=[pytest.mark.slow] * slow))
    return pytest.mark.parametrize(("method", "family"), cases)


def one_by_one(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch as batches of one."""
    count = next(iter(inputs.values())).shape[0]
    return [
        {
            key: value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value
            for key, value in inputs.items()
        }
        for row in range(count)
    ]


def begin(delta: Delta, family: str, inputs: dict[str, Any], steps: int = 10) -> None:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return zoo.loss_of(family, model, batch)

    delta.procedure.begin(dw.Run(steps=steps, batches=[inputs], loss=loss, one_by_one=one_by_one(inputs)))


@torch.no_grad()
def disturb(delta: Delta, seed: int = 1, size: float = 0.1) -> None:
    """Move every trained tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in delta.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def tuned(method: str, family: str, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any], Delta]:
    """A model with an adapter that has moved away from its start."""
    model, inputs = build(family, dtype)
    delta = attach(model, method)
    begin(delta, family, inputs)
    disturb(delta)
    return model, inputs, delta


def cast(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    moved = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.to(dtype), moved


def frozen_output(family: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The base model's output with all weights frozen, as they are under an adapter."""
    model, inputs = build(family, dtype)
    model.requires_grad_(False)
    return zoo.output_of(family, model, inputs)


def held(model: nn.Module) -> dict[str, Tensor]:
    """What a model is kept in, copied: parameters and buffers, of quantized ones codes and scales."""
    modules = model.named_modules()
    return {f"{path}.{i}": piece.clone() for path, module in modules for i, piece in enumerate(storages(module))}


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12))
