"""Banks: the low-rank factors of a module's adapters stacked in one tensor, so that each row of a batch is an index.

An adapter has the same slot in all banks of its model. Its factors are copied there when ``dw.rows`` first names it,
and again when its tensors have changed since; that and leaving cost in proportion to its own size. A bank doubles
when it is full, and slots of adapters that were taken off are used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.layers import at_strength
from deltaworks.core.places import LINEAR, features_of
from deltaworks.core.quantized import is_quantized
from deltaworks.core.replacing import base_dtype

if TYPE_CHECKING:
    from deltaworks.core.building import Attached
    from deltaworks.core.delta import Delta


def is_product(tuner: Any) -> bool:
    """Whether a tuner can be one slice of a batched low-rank product, but for its dropout."""
    return tuner.form() == 1 and tuner.place.kind in LINEAR


def side_by_side(tuners: Iterable[Any], out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The products of one adapter's tuners as one: A [rank, in] and B [rank, out], which holds their scales."""
    downs, ups = [], []
    for tuner in tuners:
        A, B, scale = at_strength(tuner).factors()
        wide = torch.promote_types(B.dtype, dtype)
        up = (B.to(wide) * scale).to(dtype).T
        if tuner.place.part is not None:
            start, stop = tuner.place.part
            up = F.pad(up, (start, out - stop))
        downs.append(A.to(dtype))
        ups.append(up)
    return torch.cat(downs), torch.cat(ups)


class Bank:
    """The factors of one module: A [slots, rank, in] and B [slots, rank, out], in the dtype of its arithmetic.

    Smaller ranks are filled up with zeros, and slot 0 is all zero. ``members`` are the adapters that stand at the
    module, ``others`` those of them whose changes are not low-rank products; ``drops`` where a member has dropout.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.members: set[str] = set()
        self.others: tuple[str, ...] = ()
        self.drops = False

    def put(self, name: str, tuners: Sequence[Any], slot: int, slots: int, dtype: torch.dtype) -> None:
        """Copy an adapter's factors to a slot; ``slots`` is how many there are in the model."""
        self.members.add(name)
        self.drops |= any(tuner.dropout for tuner in tuners)
        if not all(map(is_product, tuners)):
            self.others = (*self.others, name)
            return
        A, B = side_by_side(tuners, features_of(self.module)[1], dtype)
        self.resize(slots, len(A), A, B)
        for bank, factor in ((self.A, A), (self.B, B)):
            assert bank is not None
            bank[slot, : len(factor)] = factor
            bank[slot, len(factor) :] = 0

    def resize(self, slots: int, rank: int = 0, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Have so many slots, and at least this rank, in the dtype of A and B."""
        self.A, self.B = _resized(self.A, slots, rank, A), _resized(self.B, slots, rank, B)

    def remove(self, name: str, slot: int) -> bool:
        """Empty an adapter's slot; whether another one is left."""
        self.members.discard(name)
        self.others = tuple(other for other in self.others if other != name)
        if self.A is not None and self.B is not None:
            self.A[slot].zero_()
            self.B[slot].zero_()
        return bool(self.members)

    def add(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """y + the changes of the rows, of which ``slots`` [batch] has the slots; see ``add_products``."""
        if self.A is None or self.B is None:
            return y
        slots = slots.to(x.device)
        return add_products(x, y, self.A.index_select(0, slots), self.B.index_select(0, slots))


def add_products(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y + x A^T B by rows of the batch, with A [batch, rank, in] and B [batch, rank, out].

    Without gradients y is changed in place.
    """
    inner = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), A.to(x.dtype).mT)  # [batch, tokens, rank]
    B = B.to(inner.dtype)
    if y.dtype == inner.dtype and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(len(y), -1, y.shape[-1]).baddbmm_(inner, B)
        return y
    return y + torch.bmm(inner, B).view(y.shape).to(y.dtype)


def _resized(bank: Tensor | None, slots: int, rank: int, like: Tensor | None) -> Tensor | None:
    """A bank of at least these slots and this rank, with what it held."""
    like = bank if like is None else like
    if like is None:
        return None
    old = like.new_zeros(0, 0, like.shape[-1]) if bank is None else bank
    if len(old) >= slots and old.shape[1] >= rank and (old.dtype, old.device) == (like.dtype, like.device):
        return old
    larger = like.new_zeros(max(slots, len(old)), max(rank, old.shape[1]), like.shape[-1])
    larger[: len(old), : old.shape[1]] = old
    return larger


class Entry:
    """What one adapter has in the banks, and the state of its tensors when they were copied there."""

    def __init__(self, delta: Delta, slot: int) -> None:
        self.delta, self.slot = delta, slot
        self.banks: list[Bank] = []
        self.attached: list[Attached] = []
        self.tuners: list[tuple[Any, float]] = []
        self.held: list[tuple[dict[str, Any], list[tuple[str, Any, Any]]]] = []

    def note(self) -> None:
        """Remember the tensors as they are now."""
        self.attached = self.delta.attached
        self.tuners = [(tuner, tuner.strength) for tuner in self.delta.tuners()]
        homes = (home for tuner, _ in self.tuners for m in tuner.modules() for home in (m._parameters, m._buffers))
        self.held = [(home, [(key, value, _state(value)) for key, value in home.items()]) for home in homes if home]

    def is_current(self) -> bool:
        """Whether no tensor was replaced or changed since."""
        if self.attached is not self.delta.attached:
            return False
        for home, values in self.held:
            if len(home) != len(values):
                return False
            for key, value, state in values:
                if home.get(key) is not value or _state(value) != state:
                    return False
        return all(tuner.strength == strength for tuner, strength in self.tuners)


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What is another one after a tensor was changed in place, or got other storage."""
    if tensor is None:
        return None
    return (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


class Banks:
    """The banks of one model: who has which slot, and copies that are out of date."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.free: list[int] = []
        self.slots = 1  # with slot 0, which no adapter has
        self.capacity = 1  # slots of every bank

    def slot(self, name: str | None) -> int:
        """The slot of an adapter, 0 of none."""
        return 0 if name is None else self.entries[name].slot

    def admit(self, deltas: Iterable[Delta]) -> None:
        """Give slots to these adapters. Raises UserError for one that cannot be a row."""
        new = [delta for delta in deltas if delta.name not in self.entries]
        for delta in new:
            if limit := delta.limit("rows"):
                raise UserError(f"adapter {delta.name!r} cannot be one row of a mixed batch: {limit}")
        for delta in new:
            slot = self.free.pop() if self.free else self.slots
            self.slots = max(self.slots, slot + 1)
            self.entries[delta.name] = Entry(delta, slot)
        if self.slots > self.capacity:
            self.capacity = max(self.slots, 2 * self.capacity)
            for bank in {bank for entry in self.entries.values() for bank in entry.banks}:
                bank.resize(self.capacity)

    def update(self, names: Iterable[str]) -> None:
        """Bring the copies of these adapters up to date."""
        for name in names:
            if not self.entries[name].is_current():
                self._copy(self.entries[name])

    @torch.no_grad()
    def _copy(self, entry: Entry) -> None:
        delta, slot = entry.delta, entry.slot
        self._leave(entry)
        dtype = base_dtype(delta.model)
        for path in delta.paths():
            module: Any = delta.model.get_submodule(path)
            if module._bank is None:
                module._bank = Bank(module)
            weight = module._parameters.get("weight")
            own = dtype if weight is None or is_quantized(module) else weight.dtype
            module._bank.put(delta.name, module.deltas[delta.name], slot, self.capacity, own)
            entry.banks.append(module._bank)
        entry.note()

    def forget(self, name: str) -> None:
        """Give the slot of an adapter that is taken off to the next one."""
        entry = self.entries.pop(name, None)
        if entry is not None:
            self._leave(entry)
            self.free.append(entry.slot)

    def _leave(self, entry: Entry) -> None:
        for bank in entry.banks:
            if not bank.remove(entry.delta.name, entry.slot) and bank.module.__dict__.get("_bank") is bank:
                bank.module.__dict__["_bank"] = None
        entry.banks = []
