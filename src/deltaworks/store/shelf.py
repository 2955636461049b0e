"""More adapters than a model should hold at once: attached when they are used, then in host memory, then on disk."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaworks.core import mixing
from deltaworks.core.board import board_of, switch
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.installing import install
from deltaworks.store.checkpoint import load

Source = str | Path
"""Where an adapter lies: a folder of this machine, or an id on the Hub."""


class Shelf:
    """Saved adapters of one model, by their folders or Hub ids; the least recently used give way to others.

    ``max_active`` adapters are attached at once (vLLM: ``max_loras``); ``max_cpu`` of those that gave way are kept in
    host memory, and only the others are read again. Adapters that were attached by hand do not count. What training
    changes is lost when an adapter leaves host memory: save it first. ``options`` are those of ``dw.load``.

        shelf = dw.Shelf(model, max_active=8, max_cpu=64)
        shelf.use("adapters/support")
        with shelf.rows(["adapters/support", None, "ada/sales"]):
            model(**batch)
    """

    def __init__(self, model: nn.Module, *, max_active: int = 8, max_cpu: int = 64, **options: Any) -> None:
        if max_active < 1 or max_cpu < 0:
            raise UserError(f"a shelf needs max_active >= 1 and max_cpu >= 0, not {max_active} and {max_cpu}")
        self.model, self.max_active, self.max_cpu, self.options = model, max_active, max_cpu, options
        self.active: OrderedDict[str, Delta] = OrderedDict()  # the last one was used last
        self.resting: OrderedDict[str, Delta] = OrderedDict()

    def use(self, source: Source | None) -> Delta | None:
        """Let one adapter act, or none. Returns its handle. Raises UserError for what cannot be loaded."""
        if source is None:
            if board_of(self.model) is not None:
                switch(self.model, None)
            return None
        (delta,) = self._hold([str(source)])
        switch(self.model, delta.name)
        return delta

    @contextmanager
    def rows(self, sources: Sequence[Source | None]) -> Iterator[None]:
        """One adapter for each row of the batch, as ``dw.rows``. Raises UserError for more than ``max_active``."""
        chosen = [None if source is None else str(source) for source in sources]
        wanted = list(dict.fromkeys(source for source in chosen if source is not None))
        if len(wanted) > self.max_active:
            raise UserError(
                f"these rows name {len(wanted)} adapters, but {self.max_active} can be attached at once: "
                f"give the shelf max_active={len(wanted)}, or split the batch"
            )
        names = {source: delta.name for source, delta in zip(wanted, self._hold(wanted), strict=True)}
        if board_of(self.model) is None:  # nothing was ever attached, and no row wants anything
            yield
            return
        with mixing.rows(self.model, [None if source is None else names[source] for source in chosen]):
            yield

    def _hold(self, sources: Sequence[str]) -> list[Delta]:
        """These adapters, attached; who acts stays as it was."""
        for source in [source for source, delta in self.active.items() if not _is_attached(delta)]:
            del self.active[source]  # detached by hand
        for source in sources:
            if source in self.active:
                self.active.move_to_end(source)
        for source in sources:
            if source not in self.active:
                leaving = self._least_needed(sources) if len(self.active) >= self.max_active else None
                self.active[source] = self._attached(source)
                if leaving is not None:
                    self._give_way(leaving)
        return [self.active[source] for source in sources]

    def _least_needed(self, sources: Sequence[str]) -> str:
        """The least recently used of those that are not asked for now, and are no row of a batch."""
        board = board_of(self.model)
        rows = board.rows.names if board is not None and board.rows is not None else ()
        for source, delta in self.active.items():
            if source not in sources and delta.name not in rows:
                return source
        raise UserError(
            f"all {self.max_active} adapters that the shelf may attach act in rows() now: leave that block first, "
            "or give the shelf a larger max_active"
        )

    def _attached(self, source: str) -> Delta:
        board = board_of(self.model)
        before = board.wanted if board is not None else ()
        delta = self.resting.pop(source, None)
        if delta is None:
            delta = load(self.model, source, name=_name_of(source), **self.options)
        else:
            _move(delta, None)
            delta.board = board or delta.board
            install(delta)
            for tuner in delta.tuners():
                tuner.train(self.model.training)
        delta.board.show(before)
        return delta

    def _give_way(self, source: str) -> None:
        delta = self.active.pop(source)
        delta.detach()
        _move(delta, torch.device("cpu"))
        self.resting[source] = delta
        while len(self.resting) > self.max_cpu:
            self.resting.popitem(last=False)

    def __repr__(self) -> str:
        return f"Shelf({len(self.active)} of {self.max_active} active, {len(self.resting)} of {self.max_cpu} in memory)"


def _is_attached(delta: Delta) -> bool:
    return delta.board.deltas.get(delta.name) is delta


def _name_of(source: str) -> str:
    """A name that an adapter can have: the end of its path, and a mark of the whole."""
    mark = hashlib.sha256(source.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name).strip("-") + f"-{mark}"


def _move(delta: Delta, device: torch.device | None) -> None:
    """An adapter's tensors to a device, or each to that of the module where it stands."""
    for item in delta.attached:
        module = delta.model.get_submodule(item.place.path)
        own = next(module.parameters(), None)
        item.tuner.to(device or (own.device if own is not None else "cpu"))
