"""Which tuners of a wrapped module act now, and its parameters as they make them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.board import Board
from deltaworks.core.forms import Tuner
from deltaworks.core.layers import at_strength
from deltaworks.core.weights import base_tensors, effective


class Selected:
    """Tuners of one shape under several adapters, with the acting one chosen by a tensor: one graph for all."""

    def __init__(self, tuners: list[Tuner], index: Tensor) -> None:
        self.template = tuners[0]
        members = [dict(tuner.named_parameters()) | dict(tuner.named_buffers()) for tuner in tuners]
        self.values = {
            name: torch.stack([member[name] for member in members]).index_select(0, index.to(value.device)).squeeze(0)
            for name, value in members[0].items()
        }

    def __getattr__(self, name: str) -> Any:
        if name in ("factors", "selecting", "weight", "bias", "tensor", "around"):
            return functools.partial(self._call, name)
        return getattr(self.template, name)

    def _call(self, form: str, *arguments: Any) -> Any:
        return torch.func.functional_call(self.template, self.values, (form, *arguments))


def acting(module: Any) -> list[Any]:
    """The tuners of a wrapped module that act now."""
    board: Board = module._board
    if torch.compiler.is_compiling() and board.single and module._alike and len(module.deltas) == len(board.deltas) > 1:
        columns = zip(*module.deltas.values(), strict=True)
        return [Selected(list(column), board.index) for column in columns]
    if not len(module.deltas):  # only watched: a graph through here need not know who acts
        return []
    return [at_strength(tuner) for name in board.active if name in module.deltas for tuner in module.deltas[name]]


@contextmanager
def shown(module: Any) -> Iterator[None]:
    """Let ``module.weight`` and its other parameters be the effective ones for a while, gradients included.

    For losses that multiply by the weight of the output layer themselves. Only changes of the weight (forms 1 and 2)
    can be seen so, and dropout inside them does not act.
    """
    tuners = acting(module)
    module._effective = effective(tuners, base_tensors(module)) if tuners else None
    try:
        yield
    finally:
        module._effective = None
