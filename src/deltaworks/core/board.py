"""Which adapters of a model act now: data that every wrapped module of the model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.paths import join

if TYPE_CHECKING:
    from deltaworks.core.banks import Banks
    from deltaworks.core.cutting import Cut
    from deltaworks.core.delta import Delta
    from deltaworks.core.mixing import Rows


class Tap:
    """A value seen inside one module and needed in another one, within one forward pass."""

    def __init__(self, side: str, graded: bool = False) -> None:
        # "input", "output", "mask" (the token mask of a trunk), or "call": (arguments, keywords, output) as they were
        self.side = side
        self.graded = graded  # only while gradients are recorded
        self.value: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts without the values of a forward pass."""
        return {**self.__dict__, "value": None}


class Board:
    """The adapters of one model and which of them act. Switching changes this object and, for an adapter that cuts
    its base, the size of the base's weights.

    ``index`` holds the position of the acting adapter among ``deltas`` as a tensor, so that a compiled graph
    reads it as data; ``rows`` says who acts in each row of a batch, where ``banks`` hold low-rank factors for it.
    """

    def __init__(self) -> None:
        self.deltas: dict[str, Delta] = {}
        self.wanted: tuple[str, ...] = ()
        self.active: tuple[str, ...] = ()
        self.single = False  # exactly one acts: ``index`` says which, and compiled graphs guard on nothing else
        self.index = torch.zeros(1, dtype=torch.long)
        self.rows: Rows | None = None
        self.banks: Banks | None = None
        self.frozen: dict[str, bool] = {}  # requires_grad of the base before the first attach
        self.nesting: list[nn.Module] = []  # modules that made nested tensors before the first attach
        self.counting: list[nn.Module] = []  # modules with running statistics, which rest while adapters are there
        self.cut: Cut | None = None  # what the base lacks now

    def show(self, names: Iterable[str]) -> None:
        """Make exactly these adapters act (merged ones are in the weights already)."""
        self.wanted = self.fit(names)
        self.active = tuple(name for name in self.wanted if not self.deltas[name].merged)
        self.single = len(self.active) == 1
        if self.single:
            self.index.fill_(list(self.deltas).index(self.active[0]))

    def fit(self, names: Iterable[str]) -> tuple[str, ...]:
        """Cut the base as these adapters (and merged ones) need it, and return their names. Raises UserError."""
        names = tuple(names)
        there = [delta for name, delta in self.deltas.items() if name in names or delta.merged]
        cutting = next((delta for delta in there if delta.cut is not None), None)
        if cutting is not None and len(there) > 1:
            raise UserError(
                f"adapter {cutting.name!r} ({cutting.config}) has cut the base to its own size, so no other one can "
                "act beside it: switch to one of them"
            )
        self._swap(None if cutting is None else cutting.cut)
        return names

    def _swap(self, cut: Cut | None) -> None:
        if cut is not self.cut:
            if self.cut is not None:
                self.cut.undo()
            if cut is not None:
                cut.apply()
            self.cut = cut

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The base with all that adapters have cut away; afterwards it is as those that act need it."""
        self._swap(None)
        try:
            yield
        finally:
            self.fit(self.wanted)

    @contextmanager
    def fitted(self, names: Iterable[str]) -> Iterator[None]:
        """The base as these adapters need it."""
        self.fit(names)
        try:
            yield
        finally:
            self.fit(self.wanted)

    def check(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None and name not in self.deltas:
                raise UserError(f"no adapter is called {name!r} here: {nearest(str(name), self.deltas)}")


def base_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of everything in a model but its adapters, each module once, as ``named_modules`` has them."""
    waiting: list[tuple[str, Any]] = [("", model)]
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            own = "deltas" if "_board" in module.__dict__ else None
            held = ((name, child) for name, child in module._modules.items() if name != own and child is not None)
            waiting += reversed([(join(path, name), child) for name, child in held])
            yield path, module


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything in a model but its adapters, each parameter once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield join(path, name), parameter


def board_of(model: nn.Module) -> Board | None:
    """The board of a model that has adapters (found on any of its modules), else None."""
    for _, module in base_modules(model):
        board = module.__dict__.get("_board")
        if board is not None:
            return board
    return None


def require_board(model: nn.Module) -> Board:
    board = board_of(model)
    if board is None:
        raise UserError(f"{type(model).__name__} has no adapter: attach one first with dw.attach(model, 'lora')")
    return board


def switch(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Let one adapter, several, or none act. O(1): no tensor moves, nothing is compiled again.

    Several adapters add up where each is a change of the weight by addition, and stack in the given order where
    they wrap an operation. Raises UserError for an unknown name or for adapters that cannot act together.
    """
    board = require_board(model)
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    board.check(chosen)
    if len(chosen) > 1:
        unsummable = [
            name for name in chosen for tuner in board.deltas[name].tuners() if tuner.form() == 2 and not tuner.adds
        ]
        if len(set(unsummable)) > 1 or (unsummable and len(chosen) > 1):
            raise UserError(
                f"adapter {unsummable[0]!r} ({board.deltas[unsummable[0]].config}) replaces the weight it finds, "
                "so it cannot be summed with others: switch to one of them"
            )
    board.show(chosen)
