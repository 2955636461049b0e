"""A smaller base for one adapter: units are cut out of the weights while it acts, and put back bit for bit.

The weights become smaller tensors; what was removed lies on the CPU meanwhile, so that a whole base costs no second
copy. The adapter's own tensors are sliced alike, for good; whole tuners and single ranks can go as well. A checkpoint
holds the indices of the removed units and the ranks, beside the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.places import LINEAR, features_of, kind_of
from deltaworks.core.units import Units, heads, neurons

if TYPE_CHECKING:
    from deltaworks.core.anatomy import Anatomy
    from deltaworks.core.delta import Delta

PREFIX = "<cut>/"
RANKS = PREFIX + "ranks"
WHOLE = -1  # in place of a rank: of this tuner no rank was cut
COUNTS = (
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head"),
    *("all_head_size", "inner_dim", "split_size"),
)
"""Attributes of attention modules that count heads, or features of all heads."""
INNER = {"A": 0, "B": 1, "D": 0, "U": 1, "b_D": 0}
"""The dimension that holds the rank of a low-rank product, or the neurons of a bottleneck, by tensor."""


class Cut:
    """Units removed from a base: ``removed`` holds their ascending indices by the name of their `Units`."""

    def __init__(self, model: nn.Module, units: Sequence[Units], removed: Mapping[str, Tensor]) -> None:
        self.model = model
        self.units = {each.name: each for each in units}
        self.removed = {name: removed[name].to("cpu", torch.int32) for name in self.units}
        self.gone: dict[tuple[str, str], Tensor] = {}  # features by (path, side)
        for name, index in self.removed.items():
            for edge in self.units[name].edges:
                features = edge.start + (index.long()[:, None] * edge.size + torch.arange(edge.size)).flatten()
                before = self.gone.get((edge.path, edge.side), features[:0])
                self.gone[edge.path, edge.side] = torch.cat([before, features]).sort().values
        self.kept = {key: _others(gone, self._features(*key)) for key, gone in self.gone.items()}
        self._aside: dict[tuple[str, str, str], Tensor] = {}
        self._counts: list[tuple[str, str, int]] = []  # attributes as they were

    def _features(self, path: str, side: str) -> int:
        inner, out = features_of(self.model.get_submodule(path))
        return out if side == "out" else inner

    def count(self, name: str) -> int:
        """How many units are left of one sub-layer."""
        return self.units[name].count - len(self.removed[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Make the weights of the model smaller."""
        for (path, side), gone in self.gone.items():
            module = self.model.get_submodule(path)
            for name, dim in _sliced(module, side):
                whole: Any = module._parameters[name]
                aside = whole.detach().index_select(dim, gone.to(whole.device))
                self._aside[path, side, name] = aside if aside.is_meta else aside.cpu()
                kept = whole.detach().index_select(dim, self.kept[path, side].to(whole.device))
                module._parameters[name] = nn.Parameter(kept, requires_grad=False)
            _size(module)
        for units in self.units.values():
            owner = None if units.owner is None else self.model.get_submodule(units.owner)
            for name in COUNTS if units.owner is not None else ():
                value = getattr(owner, name, None)
                if isinstance(value, int) and value % units.count == 0:
                    self._counts.append((str(units.owner), name, value))
                    setattr(owner, name, value // units.count * self.count(units.name))

    @torch.no_grad()
    def undo(self) -> None:
        """Put the removed units back."""
        for (path, side, name), aside in reversed(self._aside.items()):
            module: Any = self.model.get_submodule(path)
            left = module._parameters[name].detach()
            dim = dict(_sliced(module, side))[name]
            shape = list(left.shape)
            shape[dim] += aside.shape[dim]
            whole = left.new_empty(shape)
            for part, index in ((left, self.kept), (aside.to(left), self.gone)):
                whole.index_copy_(dim, index[path, side].to(left.device), part)
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            _size(module)
        for path, name, value in self._counts:
            setattr(self.model.get_submodule(path), name, value)
        self._aside, self._counts = {}, []

    def fill(self) -> None:
        """Give the model its whole shape again with zeros for the removed units, which changes no output."""
        self._aside = {key: torch.zeros_like(aside) for key, aside in self._aside.items()}
        self.undo()


def _others(index: Tensor, count: int) -> Tensor:
    """The positions below ``count`` that are not in ``index``."""
    return torch.ones(count, dtype=torch.bool).index_fill(0, index.long(), False).nonzero().flatten()


def _sliced(module: Any, side: str) -> Iterator[tuple[str, int]]:
    """The parameters of a linear that reach one side of it, with the dimension there."""
    yield "weight", int((side == "in") ^ (kind_of(module) == "conv1d"))
    if side == "out" and module._parameters.get("bias") is not None:
        yield "bias", 0


def _size(module: Any) -> None:
    """Attributes of a linear that repeat the shape of its weight."""
    names = ("nx", "nf") if kind_of(module) == "conv1d" else ("out_features", "in_features")
    for name, size in zip(names, module._parameters["weight"].shape, strict=True):
        setattr(module, name, size)


# ---- the adapter on it ----------------------------------------------------------------------------------------------


def ranked(tuner: Tuner) -> bool:
    """Whether single ranks of a tuner can be cut: a low-rank product of its own A and B, or a bottleneck U f(D x)."""
    own: dict[str, Any] = dict(tuner.named_parameters())
    if own.keys() == {"A", "B"} and tuner.form() == 1 and not tuner.gives("around"):
        A, B, _ = tuner.factors()
        return A is own["A"] and B is own["B"] and not any(True for _ in tuner.buffers())
    if not {"D", "U", "b_D"} <= own.keys() or own["D"].dim() != 2:
        return False
    return own["D"].shape == own["U"].shape[::-1] and own["b_D"].shape == own["D"].shape[:1]


def check_sliceable(delta: Delta, units: Sequence[Units]) -> None:
    """Raises UserError where a tuner stands at a weight that will be cut, and cannot be sliced with it."""
    paths = {edge.path for each in units for edge in each.edges}
    owners: dict[int, int] = {}
    for item in delta.attached:
        for parameter in item.tuner.parameters():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for item in delta.attached:
        if item.place.path in paths and item.place.kind in LINEAR:
            shared = any(owners[id(parameter)] > 1 for parameter in item.tuner.parameters())
            if item.place.part is not None or shared or item.tuner.form() != 1 or not ranked(item.tuner):
                name = getattr(item.tuner.config, "name", "what is trained in full")
                raise UserError(
                    f"{name} at {item.place.path!r} cannot be sliced with its weight, only plain low-rank products "
                    "over a whole weight can: stand on lora, or on adapters beside the weights such as houlsby"
                )


def shrink(delta: Delta, cut: Cut, ranks: Mapping[str, Tensor]) -> None:
    """Cut the base of an adapter and the adapter with it; it must have none yet, and no optimizer.

    ``ranks`` are the indices of the ranks that stay, by the key of the tuner; without any the tuner is taken off.
    """
    delta.cut = cut
    try:
        delta.board.show(delta.board.wanted)
    except UserError:
        delta.cut = None
        raise
    for item in list(delta.attached):
        path, linear = item.place.path, item.place.kind in LINEAR
        for side, name, dim in (("out", "B", 0), ("in", "A", 1)) if linear else ():
            if (path, side) in cut.kept:
                _take(item.tuner, name, dim, cut.kept[path, side])
        index = ranks.get(item.key)
        if index is not None and len(index):
            for name, dim in INNER.items():
                if name in item.tuner._parameters:
                    _take(item.tuner, name, dim, index)
        elif index is not None:
            delta.drop(item)
    delta.ranks = {key: len(index) for key, index in ranks.items()}
    delta.reshaped()


def _take(tuner: Tuner, name: str, dim: int, index: Tensor) -> None:
    old: Any = tuner._parameters[name]
    new = old.detach().index_select(dim, index.to(old.device))
    tuner._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def cut_tensors(delta: Delta) -> dict[str, Tensor]:
    """What a checkpoint holds of an adapter's cut: removed units, and the rank of each tuner that there was."""
    if delta.cut is None:
        return {}
    ranks = torch.tensor([delta.ranks.get(key, WHOLE) for key in delta.keys], dtype=torch.int32)
    return {PREFIX + name: index for name, index in delta.cut.removed.items()} | {RANKS: ranks}


def shrink_as(delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut as a checkpoint says and return its other tensors. Raises UserError for a cut that this base cannot have."""
    told = {key: value.cpu() for key, value in tensors.items() if key.startswith(PREFIX)}
    own = cut_tensors(delta)
    if told and not own:
        with delta.board.whole():
            _shrink_as(delta, told)
    elif told.keys() != own.keys() or not all(torch.equal(told[key], own[key]) for key in own):
        raise UserError("this adapter has cut its base already, and otherwise than the checkpoint: attach it anew")
    return {key: value for key, value in tensors.items() if key not in told}


def _shrink_as(delta: Delta, told: dict[str, Tensor]) -> None:
    units = _named(delta.model, delta.anatomy, [key.removeprefix(PREFIX) for key in told if key != RANKS])
    removed = {each.name: told[PREFIX + each.name] for each in units}
    for each in units:
        _check(PREFIX + each.name, removed[each.name], each.count)
    check_sliceable(delta, units)
    ranks = told.get(RANKS, torch.empty(0))
    if ranks.shape != (len(delta.keys),) or ranks.is_floating_point():
        raise UserError(f"the checkpoint's {RANKS!r} does not tell the ranks of {len(delta.keys)} tuners")
    kept = {}
    for item, rank in zip(delta.attached, ranks.tolist(), strict=True):
        if rank != WHOLE:
            most = _rank(item.tuner) if ranked(item.tuner) else -1
            if not 0 <= rank <= most:
                raise UserError(f"the checkpoint's {RANKS!r} names rank {rank} for {item.key!r}, which cannot have it")
            kept[item.key] = torch.arange(rank)
    shrink(delta, Cut(delta.model, units, removed), kept)


def _rank(tuner: Any) -> int:
    return (tuner.A if "A" in tuner._parameters else tuner.D).shape[0]


def _named(model: nn.Module, anatomy: Anatomy, names: Sequence[str]) -> list[Units]:
    """The units of these names."""
    found: dict[str, Units] = {}
    problem = ""
    finders: tuple[Callable[..., list[Units]], ...] = (heads, neurons)
    for find in finders:
        try:
            found |= {each.name: each for each in find(model, anatomy)}
        except UserError as error:
            problem = f": {error}"
    for name in names:
        if name not in found:
            raise UserError(f"the checkpoint cuts {name!r}, which cannot be cut here{problem}")
    return [found[name] for name in names]


def _check(key: str, index: Tensor, count: int) -> None:
    whole = index.dim() == 1 and not index.is_floating_point() and index.dtype != torch.bool
    if (
        not whole
        or len(index) >= count
        or not bool((index.diff() > 0).all())
        or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < count)
    ):
        raise UserError(f"the checkpoint's {key!r} does not hold ascending indices of some of {count} units")
