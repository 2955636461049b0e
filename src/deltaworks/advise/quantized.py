"""A quantized base without values: the linear layers of its blocks hold the bytes that their libraries' do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.advise.bodies import Body
from deltaworks.core.errors import UserError, nearest
from deltaworks.core.places import features_of
from deltaworks.core.replacing import replace
from deltaworks.train.quantizing import group_of, quantizable

BLOCK = 64  # entries that share a scale in bitsandbytes
DOUBLE_BLOCK = 256  # scales that share a scale
LEVELS, SCALE_LEVELS = 16, 256  # values that a code of 4 bits, and one of a scale, can stand for


class Coded(nn.Module):
    """A linear layer without values, as quantized as its library has it: ``weight`` holds codes and ``state`` the rest.

    A plain weight is made when one is asked for, and known to be spread as ``learn`` is told.
    """

    def __init__(self, linear: nn.Module, state: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = features_of(linear)
        self.dtype = linear.weight.dtype
        state.shape = torch.Size((self.out_features, self.in_features))
        packed = torch.empty(state.bytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.quant_state = state  # type: ignore[attr-defined]
        self.bias = linear.bias
        self.learn: Callable[[Tensor], Any] = lambda tensor: None

    def dequantize(self) -> Tensor:
        """A weight [out, in]."""
        dense = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")  # type: ignore[arg-type]
        self.learn(dense)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)  # type: ignore[arg-type]


def _meta(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Form:
    """What the states of one model's layers have in common; ``group`` are the entries that share a scale in int4wo."""

    dtype: torch.dtype
    double: bool
    group: int


def _four_bits(out: int, inner: int, form: Form) -> Any:
    """Half a byte for each entry, a scale for each block, and tables of what codes stand for (arXiv:2305.14314)."""
    blocks = ceil(out * inner / BLOCK)
    whole = SimpleNamespace(bytes=ceil(out * inner / 2), code=_meta(LEVELS), nested=form.double)
    if not form.double:
        return SimpleNamespace(**vars(whole), absmax=_meta(blocks))
    scales = SimpleNamespace(absmax=_meta(ceil(blocks / DOUBLE_BLOCK)), code=_meta(SCALE_LEVELS))
    return SimpleNamespace(**vars(whole), absmax=_meta(blocks, torch.uint8), offset=_meta(1), state2=scales)


def _eight_bits(out: int, inner: int, form: Form) -> Any:
    """A byte for each entry and a float32 scale for each row."""
    return SimpleNamespace(bytes=out * inner, absmax=_meta(out), code=_meta(0), nested=False)


def _eight_bits_alone(out: int, inner: int, form: Form) -> Any:
    """As above, with a byte for the zero point of each row."""
    return SimpleNamespace(bytes=out * inner, absmax=_meta(out), code=_meta(out, torch.uint8), nested=False)


def _four_bits_alone(out: int, inner: int, form: Form) -> Any:
    """Half a byte for each entry; a scale and a zero point for each group, in the dtype of the weight."""
    pairs = out * inner // form.group
    return SimpleNamespace(bytes=out * inner // 2, absmax=_meta(2 * pairs, form.dtype), code=_meta(0), nested=False)


STATES = {
    "nf4": _four_bits,
    "fp4": _four_bits,
    "int8": _eight_bits,
    "int8wo": _eight_bits_alone,
    "int4wo": _four_bits_alone,
}


def quantize(body: Body, form: str, double: bool = True) -> None:
    """Quantize a body without values, as ``load_model`` does a model. Raises UserError for what that would refuse."""
    if form not in STATES:
        raise UserError(f"quantize={form!r} is not known; {nearest(form, STATES)}")
    layers = dict(quantizable(body.model, form))
    if not layers:
        raise UserError(f"{body.name} has no linear layers in its blocks that {form} is for")
    group = group_of(layers.values()) if form == "int4wo" else 0
    for layer in layers.values():
        inner, out = features_of(layer)
        dtype: Any = layer.weight.dtype
        replace(body.model, layer, Coded(layer, STATES[form](out, inner, Form(dtype, double, group))))
