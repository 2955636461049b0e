"""Mixed batches: one adapter for each row, low-rank factors as batched products and other changes row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.banks import Bank, Banks, add_products, is_product, side_by_side
from deltaworks.core.board import Board, require_board
from deltaworks.core.errors import UserError
from deltaworks.core.layers import at_strength
from deltaworks.core.running import Operation, run_weights


@dataclass
class Rows:
    """Who acts in each row of a batch.

    ``positions`` [batch] are positions in ``names`` (-1: none), ``slots`` [batch] the same as places in the banks.
    ``fresh`` says that the banks hold what the adapters are now.
    """

    names: tuple[str, ...]
    positions: Tensor
    slots: Tensor
    fresh: bool


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """One adapter for each row of the batch: ``with dw.rows(model, ["support", None, "sales"]): model(**batch)``.

    Adapters that are low-rank factors are applied as one batched product, whatever their ranks; other weight changes
    and operations on single modules row by row. Without gradients the factors come from banks that are made once:
    values that are changed by hand within the block act from the next block on. Raises UserError for unknown names
    and for adapters that cannot be mixed.
    """
    board = require_board(model)
    board.check(names)
    chosen = set(names)
    used = tuple(name for name in board.deltas if name in chosen)
    if merged := next((name for name in used if board.deltas[name].merged), None):
        raise UserError(f"adapter {merged!r} is merged into the weights: unmerge it before mixing rows")
    board.banks = board.banks or Banks()
    board.banks.admit(board.deltas[name] for name in used)
    with board.fitted(used):
        before, board.rows = board.rows, _assigned(board, model, used, names)
        try:
            yield
        finally:
            board.rows = before


def _assigned(board: Board, model: nn.Module, used: tuple[str, ...], names: Sequence[str | None]) -> Rows:
    assert board.banks is not None
    fresh = not (model.training and torch.is_grad_enabled())  # else every step would copy what it does not read
    if fresh:
        board.banks.update(used)
    device = next((parameter.device for parameter in model.parameters()), None)
    place = {name: position for position, name in enumerate(used)}
    positions = torch.tensor([-1 if name is None else place[name] for name in names], device=device)
    slots = torch.tensor([board.banks.slot(name) for name in names], device=device)
    return Rows(used, positions, slots, fresh)


def run_rows(module: Any, run: Callable[..., Any], board: Board, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A module with one adapter per row of its input (dimension 0)."""
    rows, compiling = board.rows, torch.compiler.is_compiling()
    assert rows is not None
    assert board.banks is not None
    if torch.is_grad_enabled():
        rows.fresh = False  # an optimizer's step may follow
    elif not rows.fresh and not compiling:
        board.banks.update(rows.names)
        rows.fresh = True
    bank: Bank | None = module._bank
    banked = rows.fresh and not (bank is not None and bank.drops and module.training)
    # a graph with banks need not know who acts: of an adapter that does not stand here they hold zeros
    if (bank is None) if banked and compiling else not _stands(module, rows):
        return run(*args, **kwargs)
    operation = Operation(module, run, args, kwargs)
    x = operation.x
    if len(x) != len(rows.positions):
        if not _stands(module, rows):
            return run(*args, **kwargs)
        raise UserError(f"dw.rows names {len(rows.positions)} rows but the batch that reached a layer has {len(x)}")
    y = operation(x)
    if banked and bank is not None:
        y, alone = bank.add(x, y, rows.slots), bank.others
    else:
        tuners = {name: list(module.deltas[name]) for name in rows.names if name in module.deltas}
        products = {name: own for name, own in tuners.items() if all(map(_is_still_product, own))}
        y, alone = _with_products(products, rows, x, y), tuple(name for name in tuners if name not in products)
    for name in alone:
        if name in rows.names:
            y = _replaced(module, name, rows, operation, y)
    return operation.replaced(y)


def _stands(module: Any, rows: Rows) -> bool:
    """Whether an adapter of these rows stands at a module."""
    return any(name in module.deltas for name in rows.names)


def _replaced(module: Any, name: str, rows: Rows, operation: Operation, y: Tensor) -> Tensor:
    """y with the rows of one adapter as its tuners make them, from the input."""
    members = (rows.positions == rows.names.index(name)).nonzero().flatten().to(y.device)
    if not len(members):
        return y
    own = [at_strength(tuner) for tuner in module.deltas[name]]
    part = run_weights(module, operation.run, own, (operation.x[members], *operation.rest), operation.kwargs)
    part = part[0] if isinstance(part, tuple) else part
    return y.index_copy(0, members, part.to(y.dtype))


def _is_still_product(tuner: Any) -> bool:
    return is_product(tuner) and not (tuner.dropout and tuner.training)


def _with_products(tuners: dict[str, list[Any]], rows: Rows, x: Tensor, y: Tensor) -> Tensor:
    """y with the changes of adapters that are products: their factors stacked anew, as gradients need them."""
    if not tuners:
        return y
    sides = {name: side_by_side(own, y.shape[-1], x.dtype) for name, own in tuners.items()}
    rank = max(len(A) for A, _ in sides.values())
    none = (x.new_zeros(0, x.shape[-1]), x.new_zeros(0, y.shape[-1]))
    ordered = [sides.get(name, none) for name in rows.names] + [none]  # which position -1 finds
    padded = ([F.pad(side, (0, 0, 0, rank - len(side))) for side in pair] for pair in ordered)
    A, B = map(torch.stack, zip(*padded, strict=True))
    positions = rows.positions.to(x.device)
    return add_products(x, y, A[positions], B[positions])
