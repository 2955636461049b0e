"""The tensors of a peft checkpoint, one by one: the name and shape there, and the tensor of ours that each is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.rows import Rows
from deltaworks.store.foreign.peft_matrices import their_path
from deltaworks.store.foreign.peft_types import Name, Shape, Spot, Type, base_added

if TYPE_CHECKING:
    from deltaworks.core.building import Attached
    from deltaworks.core.delta import Delta


TOKENS = ".token_adapter.trainable_tokens_delta"
"""What peft calls the rows of an embedding that are trained alone."""


class Slot(NamedTuple):
    """One tensor of their file."""

    theirs: str
    shape: Shape
    ours: str
    name: Name
    spot: Spot

    def read(self, tensor: Tensor) -> Tensor:
        """Their tensor as ours."""
        own = _tensors(self.spot)[self.name.ours]
        if self.name.columns is not None:
            tensor = tensor[:, self.name.columns(self.spot)]
        return self.name.read(tensor if None in self.shape else tensor.reshape(own.shape), self.spot)

    def write(self, tensor: Tensor) -> Tensor:
        """Ours as theirs."""
        value = self.name.write(tensor, self.spot)
        return value.reshape(_sizes(self._replace(shape=self.name.shape(tuple(value.shape), self.spot))))

    def into(self, tensors: dict[str, Tensor], tensor: Tensor) -> None:
        """Put ours, as theirs, among the tensors of their file."""
        value = self.write(tensor)
        if self.name.columns is not None:
            value = torch.cat([tensors.get(self.theirs, value[:, :0]), value], dim=1)  # in the order of the model
        tensors[self.theirs] = value

    def current(self) -> Tensor:
        """The tensor of ours, whether it is stored or made again."""
        return _tensors(self.spot)[self.name.ours].detach()


def slots(delta: Delta, row: Type) -> Iterator[Slot]:
    """Every tensor that a checkpoint of this adapter holds."""
    methods = [item for item in delta.attached if item.tuner.config is not None]
    adapted = {item.place.path for item in methods if item.tuner.config.name == row.method}
    for item in delta.attached:
        spot = Spot(item.tuner, delta.model.get_submodule(item.place.path), item.place)
        own = _tensors(spot)
        for name in _names(row, item, adapted):
            if name.ours in own and name.when(spot):
                theirs = name.theirs.format(path=f"{row.prefix}{their_path(delta.model, item.place)}")
                yield Slot(theirs, name.shape(tuple(own[name.ours].shape), spot), f"{item.key}.{name.ours}", name, spot)


def _names(row: Type, item: Attached, adapted: set[str]) -> tuple[Name, ...]:
    """Names of one tuner's tensors: those of its row, of a module that is trained in full, or of a bias."""
    if isinstance(item.tuner, Rows):
        return (Name("rows", f"{{path}}{TOKENS}"),)
    if item.tuner.config is None:
        masters = (name.partition(".")[2] for name in item.tuner.stored())
        return tuple(Name(f"masters.{name}", f"{{path}}.{name}") for name in masters)
    if item.tuner.config.name == "bitfit":
        inner = ".base_layer" if item.place.path in adapted else ""
        return (base_added("change", f"{{path}}{inner}.bias", "bias"),)
    return row.names[item.place.kind]


def _tensors(spot: Spot) -> dict[str, Tensor]:
    return dict(spot.tuner.named_parameters()) | dict(spot.tuner.named_buffers())


def narrowed(places: Sequence[Slot], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every LoRA of more ranks than its weight has as the same change in as many as it has."""
    found = dict(tensors)
    second = {id(slot.spot.tuner): slot for slot in places if slot.name.ours == "B"}
    for first in places:
        last = second.get(id(first.spot.tuner))
        if first.name.ours != "A" or last is None or not {first.theirs, last.theirs} <= found.keys():
            continue
        A, B = found[first.theirs].flatten(1), found[last.theirs].flatten(1)
        if not (A.is_floating_point() and B.is_floating_point()):
            continue
        if len(A) == B.shape[1] and len(A) > (most := min(len(B), A.shape[1])) == first.shape[0]:
            product, eye = B @ A, torch.eye(most, dtype=A.dtype)
            A, B = (product, eye) if most == len(B) else (eye, product)
            found |= {first.theirs: A.view(*_sizes(first)), last.theirs: B.view(*_sizes(last))}
    return found


def _sizes(slot: Slot) -> list[int]:
    return [-1 if size is None else size for size in slot.shape]


def without_twins(delta: Delta, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors without the LoRA of other owners of a tied weight, which peft writes too, and these."""
    paths = tuple(f"base_model.model.{twin.place.path}.lora_" for item in delta.attached for twin in item.twins)
    copies = {key: value for key, value in tensors.items() if key.startswith(paths)}
    return {key: value for key, value in tensors.items() if key not in copies}, copies


def check_whole(path: Path, places: Sequence[Slot], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where a tensor that holds several of ours side by side is wider than they are."""
    widths = {slot.theirs: slot.name.columns(slot.spot).stop for slot in places if slot.name.columns is not None}
    for key, width in widths.items():  # the last block's
        if tensors[key].shape[1] != width:
            raise UserError(f"{str(path)!r}: {key!r} is {tensors[key].shape[1]} wide, and this model takes {width}")


REPEATED = (".base_layer", ".original_module", ".modules_to_save")
"""Wrappers of peft: beside their tensors it may write those of the base, or a second copy."""


def without_repeated(
    delta: Delta, row: Type, tensors: Mapping[str, Tensor], expected: Collection[str]
) -> dict[str, Tensor]:
    """The tensors without those that repeat the base or each other, as peft writes an adapted embedding's.

    Raises UserError where such a tensor has values of its own, which would be lost.
    """
    kept = dict(tensors)
    for key in tensors.keys() - set(expected):
        owner, _, name = key.rpartition(".")
        plain = owner
        for wrapper in REPEATED:
            plain = plain.removesuffix(wrapper)
        twin = tensors.get(f"{plain}.{name}") if owner.endswith(".modules_to_save") else None
        known = twin if twin is not None else _base(delta, plain.removeprefix(row.prefix), name)
        if known is None:
            continue
        if not same(known, tensors[key]):
            raise UserError(f"the checkpoint's {key!r} is another than this model's: it was trained on another base")
        del kept[key]
    return kept


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding to bfloat16."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-4)


def _base(delta: Delta, path: str, name: str) -> Tensor | None:
    try:
        return delta.model.get_submodule(path)._parameters.get(name)
    except AttributeError:
        return None
