"""Attention with tuned keys and values: an attention function of transformers that stands before the real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Heads

NAME = "deltaworks"


class ConfigView:
    """A model's configuration with our attention function in place of its own."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._attn_implementation = NAME
        register()

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self._config, name)


def register() -> None:
    """Make the function known to transformers (a public extension point of it)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention function, called by its tuners with more or other keys and values.

    Shapes: query [batch, heads, length, head_dim]; key, value [batch, kv_heads, keys, head_dim]; returns
    [batch, length, heads, head_dim] and the attention weights where the function gives them.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tuners, hidden = module._attending
    name = module.__dict__["config"]._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]
    weights: list[Tensor | None] = [None]

    def base(heads: Heads) -> Tensor:
        grown = heads.key.shape[2] - key.shape[2]
        mask, extra = attention_mask, dict(kwargs)
        if grown:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            mask = widen(mask, name, causal, query, key, grown)
            if "flash" in name and kwargs.get("sliding_window") is not None:
                raise UserError(
                    f"virtual keys cannot be used with a window in {name}: choose attn_implementation='sdpa'"
                )
            if extra.get("position_bias") is not None:
                extra["position_bias"] = F.pad(extra["position_bias"], (grown, 0))
        extra["scaling"] = heads.scaling  # not read off the features of a query, which a tuner may add to
        output, weights[0] = function(module, heads.query, heads.key, heads.value, mask, **extra)
        return output

    scaling = kwargs.get("scaling")
    heads = Heads(query, key, value, hidden, query.shape[-1] ** -0.5 if scaling is None else scaling)
    around: Callable[[Heads], Tensor] = base
    for tuner in tuners:
        around = partial(tuner.around, around)
    return around(heads), weights[0]


def widen(mask: Any, name: str, causal: bool, query: Tensor, key: Tensor, grown: int) -> Any:
    """The mask with ``grown`` more columns in front that every query sees."""
    if mask is None:
        if not causal or query.shape[2] == 1 or "flash" in name:  # flash aligns causality with the last key
            return None
        # without a mask, queries and keys start together (the rest of a static cache is empty)
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return F.pad(seen, (grown, 0), value=True)[None, None]
    if not isinstance(mask, Tensor):
        raise UserError(f"virtual keys cannot be used with a {type(mask).__name__}: choose attn_implementation='sdpa'")
    visible = True if mask.dtype == torch.bool else 1 if mask.dim() == 2 else 0.0
    return F.pad(mask, (grown, 0), value=visible)
