"""Sparse entries that open one after the other while they train: all values are one tensor, opened piece by piece."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.quantized import entries
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import Choosing, EntriesTuner, largest, narrowed


class Pool:
    """The values [B] that all tensors of an adapter share, and the dense gradients that the next ones wait for."""

    def __init__(self) -> None:
        self.values: nn.Parameter | None = None
        self.gradients: dict[int, Tensor] = {}
        self.open = False  # whether gradients are wanted

    def keep(self, key: int, gradient: Tensor) -> None:
        """Add a gradient to what the step has of this tensor."""
        before = self.gradients.get(key)
        self.gradients[key] = gradient if before is None else before.float() + gradient.float()


class Opened(nn.Module):
    """The entries of one tensor: flat positions ``index`` [k], whose values are ``slots`` [k] of the pool."""

    index: Tensor
    slots: Tensor

    def __init__(self, pool: Pool, index: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    @property
    def values(self) -> Tensor:
        assert self.pool.values is not None
        return self.pool.values[self.slots]


class PooledTuner(EntriesTuner):
    """Entries whose values lie in a pool while they train; the first tuner owns it, as its parameter ``pooled``."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.pool: Pool = site.shared("pool", Pool)
        self.gives_away: set[str] = set()  # names of tied parameters that another tuner stores

    def tensor(self, name: str, base: Tensor) -> Tensor:
        changed = super().tensor(name, base)
        if self.pool.open and changed.requires_grad and not torch.compiler.is_compiling():
            pool, key = self.pool, self.own[name][0]
            changed.register_hook(lambda gradient: pool.keep(key, gradient))
        return changed

    def stored(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, module in self.chosen.items():
            entries: Any = module
            if len(entries.index) and name not in self.gives_away:
                kept |= {f"chosen.{name}.index": entries.index, f"chosen.{name}.values": entries.values.detach()}
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the entries of a finished adapter, which opens no more (one in training is filled instead)."""
        if "pooled" in self._parameters:
            self.pool.values = self.pooled = None
        super().restore(tensors)


class Growing(Choosing):
    """Opens entries in every backward pass, for the update that follows it, until ``count`` are open."""

    def __init__(self, delta: Delta, config: Any) -> None:
        super().__init__(delta, config)
        self.sizes = [entries(parameter) for parameter in self.parameters().values()]
        first = self.tuners()[0]
        self.pool: Pool = first.pool
        self.pool.values = first.pooled = nn.Parameter(torch.zeros(self.count, device=first.device))
        # flat positions among all entries, in the order of opening; ``waiting`` are those that this step opens
        self.positions = self.waiting = torch.zeros(0, dtype=torch.long, device=first.device)

    def due(self) -> int:
        """How many entries are open in the next update."""
        raise NotImplementedError

    def scores(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The score of each entry of one tensor, not negative, flat, float32."""
        raise NotImplementedError

    def loss(self, loss: Tensor) -> Tensor:
        if self.pool.values is not None and self.pool.values.grad is None:
            self.pool.gradients.clear()  # they are of a step that was skipped
        return super().loss(loss)

    @torch.no_grad()
    def choose_next(self) -> None:
        """At the end of a backward pass: what this step opens has its gradient before clipping and the update."""
        values, count = self.pool.values, len(self.positions)
        assert values is not None
        assert values.grad is not None
        wanted, start = self.due() - count, 0
        if wanted > 0 and not self.pool.gradients:
            raise UserError(f"{self.config.name} saw no gradient of a weight: train it without torch.compile")
        found: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, positions and gradients of each tensor's best
        for key, size in zip(self.parameters(), self.sizes, strict=True):
            gradient = self.pool.gradients.get(key)
            if gradient is not None and wanted > 0:
                scores = self.scores(self.values(key), gradient)
                scores[self.tuners()[0].entries[key].index] = -1.0
                best = largest(scores, min(wanted, len(scores)))
                best = best[scores[best] >= 0]
                found.append((scores[best], best + start, gradient.flatten()[best].float()))
            start += size
        if found:
            scores, positions, gradients = (torch.cat(column) for column in zip(*found, strict=True))
            best = largest(scores, min(wanted, len(scores)))
            self.waiting = positions[best]
            values.grad[count : count + len(best)] = gradients[best]

    def open_waiting(self) -> None:
        self.positions = torch.cat([self.positions, self.waiting])
        self.waiting = self.waiting[:0]
        self.pool.gradients.clear()
        self.pool.open &= len(self.positions) < self.count
        self.spread()

    def spread(self) -> None:
        """Give each tensor its part of the open entries."""
        ordered, order = self.positions.sort()
        ends = list(accumulate(self.sizes))
        parts = zip(ends, torch.searchsorted(ordered, torch.tensor(ends, device=ordered.device)).tolist(), strict=True)
        shared, low, start, seen = self.tuners()[0].entries, 0, 0, set()
        for (key, parameter), (end, high) in zip(self.parameters().items(), parts, strict=True):
            index = narrowed(ordered[low:high] - start, parameter.numel())
            shared[key] = Opened(self.pool, index, order[low:high])
            low, start = high, end
        for tuner in self.tuners():
            tuner.choose()
            tuner.gives_away = {name for name, (key, _) in tuner.own.items() if key in seen}
            seen |= {key for key, _ in tuner.own.values()}
