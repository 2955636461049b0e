"""Hard-concrete gates, numbers in [0, 1] that are often 0 or 1 and have gradients, and changes that go through them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.forms import nonzero
from deltaworks.core.sites import Site, stable_hash
from deltaworks.methods.selective.entries import EntriesTuner, narrowed

SATURATED = 30.0
"""A logit whose gate is 1 (or, negative, 0) for every noise, with no gradient."""


def gate(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """The hard-concrete z in [0, 1] of logits a and uniform noise u in (0, 1); without noise its evaluation form."""
    if noise is not None:
        logits = logits + noise.log() - (-noise).log1p()
    return (3 * logits.sigmoid() - 1.5).clamp(0, 1)


def uniform(size: int, salt: int, draw: Tensor) -> Tensor:
    """``size`` numbers in (0, 1), float32: a hash of position, ``salt`` and ``draw`` (an int64 scalar)."""
    bits = (torch.arange(size, device=draw.device) + salt) * 2685821657736338717 + draw * 6364136223846793005
    bits = (bits ^ (bits >> 32)) * 2685821657736338717  # int64 products wrap around
    bits = (bits ^ (bits >> 29)) * 6364136223846793005
    return (((bits >> 40) & 0x7FFFFF).float() + 0.5) / 2**23


def opened(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    """The logits of gates at the start: 5, so that z is 1 nearly always."""
    return nn.Parameter(torch.full(shape, 5.0, device=device))


class GatedTuner(EntriesTuner):
    """A gated change of all parameters of one module: W' = W + z_g z w.

    ``changes`` holds w and ``logits`` the a of z, both shaped like the parameters, ``groups`` the a of z_g; a loaded
    one has the entries that were kept instead.
    """

    draw: Tensor

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site)
        self.changes, self.logits, self.groups = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.first: list[str] = []  # what is stored here; the other owner of a tied parameter stores nothing
        self.salts: dict[str, int] = {}
        base = site.tensors
        for name, (key, _) in self.own.items():
            if site.shared(("owner", key), lambda: self) is self:
                self.first.append(name)
            self.salts[name] = (
                site.shared(("salt", key), partial(stable_hash, f"{site.seed}/{site.place.path}/{name}")) >> 24
            )
            self.changes[name] = site.shared(("change", key), partial(site.zeros, *base[name].shape))
            self.logits[name] = site.shared(("logits", key), partial(opened, base[name].shape, site.device))
            if config.structured:
                self.groups[name] = site.shared(("group", key), partial(opened, (), site.device))
        self.rates = {f"{kind}.{name}": config.mask_rate for kind in ("logits", "groups") for name in self.logits}
        self.register_buffer("draw", torch.zeros((), dtype=torch.long, device=site.device), persistent=False)

    def change(self, name: str, sampled: bool = False) -> Tensor:
        """z_g z w."""
        change, logits = self.changes[name], self.logits[name]
        noise = uniform(logits.numel() + 1, self.salts[name], self.draw) if sampled else None
        change = change * gate(logits, None if noise is None else noise[1:].view_as(logits))
        return change * gate(self.groups[name], None if noise is None else noise[0]) if name in self.groups else change

    def tensor(self, name: str, base: Tensor) -> Tensor:
        if name not in self.changes:
            return super().tensor(name, base)
        return base + self.change(name, self.training).to(base.dtype)

    def expected(self, name: str) -> Tensor:
        """The expected number of changed entries: l = -r, so that P(z > 0) = sigmoid(a)."""
        count = self.logits[name].sigmoid().sum()
        return count * self.groups[name].sigmoid() if name in self.groups else count

    def stored(self) -> dict[str, Tensor]:
        """The entries that are changed: all before the cut."""
        kept = {} if len(self.changes) else super().stored()
        for name in self.first if len(self.changes) else ():
            change = self.change(name).detach().flatten()
            index = nonzero(change)
            kept[f"chosen.{name}.index"] = narrowed(index, change.numel())
            kept[f"chosen.{name}.values"] = change[index]
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.changes, self.logits, self.groups = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
