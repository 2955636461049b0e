"""S2FT: train a few attention heads and feed-forward channels, as whole rows or columns of the weights.

Paper: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, Yang et al., 2024,
arXiv:2412.06289 (NeurIPS).

Formula: of all heads (channels) of all layers a share is drawn at random, once. W' = W with D added to what belongs to
them: to columns (D [out, k]; attention.o, mlp.down) or to rows (D [k, in]; attention.v, mlp.up). Forward of columns:
y = W x + D x[idx], so that the backward pass keeps x[idx] [tokens, k] alone.
Count: floor(heads H L) d_h d + floor(channels m L) d for o and down (LLaMA-2-7B: 53 heads and 7,045 channels,
56,643,584).
Departure: the published code permutes both sides of each pair of weights, so that the chosen units are neighbours,
which moves the base; here they are gathered by index, which is the same function. Where a model does not tell the size
of its heads, single channels are drawn.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site, stable_hash

ROWS = ("q", "k", "v", "qkv", "up", "gate", "gate_up")  # the other ones read what the units give: columns


class S2FTTuner(Tuner):
    """``change`` [out, k] of the columns, or [k, in] of the rows, ``index`` [k]; the seed tells which."""

    index: Tensor

    def __init__(self, site: Site, index: Tensor, rows: bool) -> None:
        super().__init__()
        (self.out, self.inner), self.rows = site.shape, rows
        shape = (len(index), self.inner) if rows else (self.out, len(index))
        self.change = site.zeros(*shape)
        self.register_buffer("index", index.to(site.device), persistent=False)

    def factors(self) -> Factors:
        units = torch.arange(len(self.index), device=self.index.device)
        one = self.change.new_ones(())
        if self.rows:
            chosen = self.change.new_zeros(self.out, len(self.index)).index_put((self.index, units), one)
            return Factors(self.change, chosen)
        chosen = self.change.new_zeros(len(self.index), self.inner).index_put((units, self.index), one)
        return Factors(chosen, self.change)

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        change = self.change.to(x.dtype)
        if self.rows:
            y = base(x)
            return y.index_add(-1, self.index, F.linear(x, change).to(y.dtype))
        columns = x.index_select(-1, self.index)  # all that the backward pass keeps of x
        y = base(x)
        return y + F.linear(columns, change).to(y.dtype)


@method(
    "s2ft",
    family="selective",
    paper="Yang et al., 2024, arXiv:2412.06289",
    kinds=("linear", "conv1d"),
    tuner=S2FTTuner,
    learning_rate=3e-4,
    tried=(3e-4, 1e-3, 3e-3),
    limits={
        "compile": "the units of each adapter are others, so that switching compiles again",
        "nothing": "the shares leave not one unit: raise heads or channels",
    },
    small={"heads": 0.5, "channels": 0.25},
)
class S2FT(Config):
    targets: str = option("attention.o,mlp.down", "the paper: these two are best; attention.v and mlp.up give rows")
    heads: float = option(0.052, "share of the heads of all layers", least=0, most=1)
    channels: float = option(0.02, "share of the feed-forward channels of all layers", least=0, most=1)

    def tuner(self, site: Site) -> Tuner | None:
        role = site.place.role
        chosen = site.shared(("s2ft", site.member, role), lambda: self.drawn(site))[site.place]
        if not len(chosen):
            return None
        size = unit(site)
        index = (chosen[:, None] * size + torch.arange(size)).flatten()
        return S2FTTuner(site, index, is_rows(site))

    def drawn(self, site: Site) -> dict[Any, Tensor]:
        """The units [k] of each place with the role of this one, ascending, drawn from all of them together."""
        sites = [site.at(place) for place in self.places(site.anatomy) if place.role == site.place.role]
        counts = [each.shape[0 if is_rows(each) else 1] // unit(each) for each in sites]
        share = self.heads if site.place.role.split(".")[0].endswith("attention") else self.channels
        generator = torch.Generator().manual_seed(stable_hash(f"{site.seed}/s2ft/{site.place.role}"))
        kept = torch.randperm(sum(counts), generator=generator)[: int(share * sum(counts))].sort().values
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        return {
            each.place: kept[(kept >= start) & (kept < end)] - start
            for each, start, end in zip(sites, ends, ends[1:], strict=False)
        }


def is_rows(site: Site) -> bool:
    return site.place.role.rpartition(".")[2] in ROWS


def unit(site: Site) -> int:
    """Channels of one unit: those of a head in attention."""
    section, _, part = site.place.role.partition(".")
    if not section.endswith("attention") or part not in ("q", "k", "v", "o"):
        return 1
    try:
        return site.heads[1]
    except UserError:
        return 1
