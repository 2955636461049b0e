"""Rows of a weight that are trained in full while the others rest: the embeddings of new tokens.

Written as a target with the rows behind it, ``embedding.token#32000-32003``. Owners of a tied weight share them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.sites import Site
from deltaworks.core.weights import base_tensors

KINDS = ("embedding", "linear")
_ITEM = re.compile(r"(?P<target>.+)#(?P<rows>[\d\s,-]+)")


def parse(item: str) -> tuple[str, list[int]] | None:
    """Target and rows of ``embedding#5,7-9``; None where no rows are named. Raises UserError for what is no range."""
    written = _ITEM.fullmatch(item)
    if written is None:
        return None
    rows: set[int] = set()
    for piece in written["rows"].split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise UserError(f"the rows of {item!r} cannot be read: write them as in 'embedding.token#32000-32003,7'")
        rows |= set(range(first, last + 1))
    return written["target"].strip(), sorted(rows)


class Rows(Tuner):
    """The values [n, features] of chosen rows, float32 masters that start at the base's."""

    tied = False  # the owners of a tied weight share the values, so that each can be quick
    index: Tensor

    def __init__(self, site: Site, rows: Sequence[int]) -> None:
        super().__init__()
        weight = base_tensors(site.module)["weight"]
        if rows[-1] >= len(weight):
            raise UserError(
                f"{site.place.name!r} has no row {rows[-1]} but {len(weight)}: call model.resize_token_embeddings first"
            )
        self.register_buffer("index", torch.tensor(rows, device=site.device), persistent=False)
        key = ("rows", id(site.module._parameters["weight"]), tuple(rows))
        self.rows = site.shared(key, lambda: nn.Parameter(weight.detach()[self.index].float()))

    def tensor(self, name: str, base: Tensor) -> Tensor:
        return base.index_copy(0, self.index, self.rows.to(base.dtype)) if name == "weight" else base


class EmbeddingRows(Rows):
    """The same where rows are looked up: nothing of the size of the table is formed."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        y = base(x)
        place = torch.searchsorted(self.index, x).clamp(max=len(self.index) - 1)
        chosen = (self.index[place] == x)[..., None]
        return torch.where(chosen, F.embedding(place, self.rows.to(y.dtype)), y)


class LinearRows(Rows):
    """The same where rows are multiplied, in an output head without a bias."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        y = base(x)
        return y.index_copy(-1, self.index, F.linear(x, self.rows.to(x.dtype)).to(y.dtype))


def rows_tuner(site: Site, rows: Sequence[int]) -> Rows:
    """The tuner that suits a module."""
    plain = getattr(site.module, "_plain_class", type(site.module))
    if plain.forward is nn.Embedding.forward:
        return EmbeddingRows(site, rows)
    return (LinearRows if plain.forward is nn.Linear.forward and site.bias is None else Rows)(site, rows)
