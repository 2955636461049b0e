"""Matrices inside modules, in a checkpoint of huggingface/peft: those of experts and of a MultiheadAttention.

``target_parameters`` names parameters. One of experts has ``lora_A.weight`` [experts r, in], one expert after the
other, and ``lora_B.weight`` [out, r experts], in which neighbours are of different experts. Its name is not said: of
several parameters of one module, in the module's order, the last has the module's path, and each one before it one
``.base_layer`` more. A MultiheadAttention that is targeted has both of its projections adapted; peft 0.21 adds the
change of the output projection twice, so that B is half of ours there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.errors import UserError, nearest
from deltaworks.core.matrices import is_read
from deltaworks.core.paths import parent_of
from deltaworks.core.places import Place
from deltaworks.store.foreign.lowering import Lowered, padded

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta

HALVES = ("lora_A.weight", "lora_B.weight")


def parameters(data: Mapping[str, Any], found: Anatomy) -> list[Place]:
    """The places that ``target_parameters`` names. Raises UserError for an entry that names none."""
    own = [place for place in found.places if place.part is None and place.kind in ("linear", "matrix")]
    full = {place: f"{place.path}.{place.parameter}" for place in own}
    chosen: dict[Place, None] = {}
    for name in data.get("target_parameters") or []:
        here = [place for place in own if full[place] == name or full[place].endswith(f".{name}")]
        if not here:
            raise UserError(f"target_parameters: {name!r} names no matrix here: {nearest(name, full.values())}")
        chosen |= dict.fromkeys(here)
    return list(chosen)


def expression(found: Anatomy, places: Sequence[Place]) -> list[str]:
    """Our ``targets`` for exactly these matrices: ends of names where they suffice, else names."""
    names = {place.path if place.expert is None and place.parameter == "weight" else _full(place) for place in places}
    for items in (sorted({".".join(name.split(".")[-2:]) for name in names}), sorted(names)):
        if set(found.select(items, {"matrix"})) == set(places):
            return items
    raise UserError(f"peft's {places[0].name!r} and the like cannot be told apart from other matrices here")


def _full(place: Place) -> str:
    return f"{place.path}.{place.parameter}"


def projections(model: nn.Module, found: Anatomy, path: str) -> list[Place]:
    """The matrices of a MultiheadAttention, the output projection last; none of another module."""
    if not isinstance(model.get_submodule(path), nn.MultiheadAttention):
        return []
    wholes = [place for place in found.places if place.kind == "matrix" and place.part is None]
    return [place for place in wholes if place.path in (path, f"{path}.out_proj")]


def their_path(model: nn.Module, place: Place) -> str:
    """The path in their file of what stands at a place; experts have names there that ``unstacked`` gives them."""
    if place.kind != "matrix" or place.expert is not None:
        return place.name
    return f"{parent_of(place.path)}.base_layer.out_proj" if is_output(model, place) else place.path


def is_output(model: nn.Module, place: Place) -> bool:
    """Whether this is the output projection of a MultiheadAttention."""
    return place.kind == "matrix" and is_read(model.get_submodule(parent_of(place.path)), place.path)


def _stacks(places: Sequence[Place], model: nn.Module) -> Iterator[tuple[str, list[Place]]]:
    """The path in their file, and the places, of each parameter of experts."""
    by_path: dict[str, dict[str, list[Place]]] = {}
    for place in places:
        if place.expert is not None:
            by_path.setdefault(place.path, {}).setdefault(place.parameter, []).append(place)
    for path, stacks in by_path.items():
        order = [name for name in model.get_submodule(path)._parameters if name in stacks]
        for depth, name in enumerate(reversed(order)):
            yield path + depth * ".base_layer", stacks[name]


def unstacked(delta: Delta, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with one pair for each expert, under the name of its place. Raises UserError for a wrong shape."""
    ranks = {item.place: item.tuner.config.rank for item in delta.attached if item.place.expert is not None}
    apart = dict(tensors)
    for item in delta.attached:
        key = f"{prefix}{their_path(delta.model, item.place)}.{HALVES[1]}"
        if is_output(delta.model, item.place) and key in apart:
            apart[key] = 2 * apart[key]
    for path, places in _stacks(list(ranks), delta.model):
        count, rank = len(places), ranks[places[0]]
        for half in HALVES:
            key = f"{prefix}{path}.{half}"
            whole = apart.pop(key, None)
            if whole is None:
                raise UserError(f"the checkpoint misses {key!r}, of {places[0].parameter} of {count} experts")
            side = 0 if half == HALVES[0] else 1
            if whole.dim() != 2 or whole.shape[side] != count * rank:
                raise UserError(
                    f"the checkpoint's {key!r} is {list(whole.shape)}, not of {count} experts x rank {rank}"
                )
            pieces = whole.view(count, rank, -1) if side == 0 else whole.view(-1, rank, count).permute(2, 0, 1)
            for place, piece in zip(places, pieces, strict=True):
                apart[f"{prefix}{place.name}.{half}"] = piece.contiguous()
    return apart


def stacked(delta: Delta, weights: Mapping[str, Lowered]) -> tuple[dict[str, Lowered], list[str]]:
    """Factors as their file has them, by the names that patterns match, and ``target_parameters``.

    Experts that are not adapted, and the other projection of a MultiheadAttention, get factors of zero.
    """
    model, found = delta.model, delta.anatomy
    result = {name: one for name, one in weights.items() if one.place.kind != "matrix"}
    matrices = {name: one for name, one in weights.items() if one.place.kind == "matrix"}
    wholes = [place for place in found.places if place.kind == "matrix" and place.part is None]
    named: list[str] = []
    for path, places in _stacks(_beside(wholes, matrices), model):
        own = _alike([matrices.get(place.name) or _none(delta, place) for place in places])
        A = torch.cat([one.A for one in own])
        B = torch.stack([one.B for one in own], dim=-1).flatten(1)  # [out, r, experts] -> [out, r experts]
        named.append(f"{places[0].path}.{places[0].parameter}")
        error = max(one.error for one in own)
        result[named[-1]] = replace(own[0], A=A, B=B, error=error, path=path, stacks=len(own))
    for one in matrices.values():
        place = one.place
        parent = place.path.removesuffix(".out_proj")
        both = projections(model, found, parent)
        if place.expert is None and not both:  # a router: one plain matrix
            named.append(f"{place.path}.{place.parameter}")
            result[named[-1]] = replace(one, path=place.path)
        elif both and parent not in result:
            if len(both) != 2:
                raise UserError(f"peft adapts no MultiheadAttention whose keys have a width of their own: {parent!r}")
            pair = _alike([matrices.get(other.name) or _none(delta, other) for other in both])
            for name, each, size in zip((parent, their_path(model, both[1])), pair, (1.0, 0.5), strict=True):
                result[name] = replace(each, B=size * each.B, path=name)
    return result, _short(named, wholes)


def _beside(wholes: Sequence[Place], chosen: Mapping[str, Lowered]) -> list[Place]:
    """All experts of every parameter of which one expert is adapted."""
    stacks = {(one.place.path, one.place.parameter) for one in chosen.values() if one.place.expert is not None}
    return [place for place in wholes if (place.path, place.parameter) in stacks]


def _none(delta: Delta, place: Place) -> Lowered:
    """No change, as factors of rank one."""
    module: Any = delta.model.get_submodule(place.path)
    shape = module._parameters[place.parameter].shape[-2:]
    out, inner = reversed(shape) if place.turned else shape
    return Lowered(place, module, torch.zeros(1, inner), torch.zeros(out, 1))


def _alike(weights: Sequence[Lowered]) -> list[Lowered]:
    """The same changes with one rank and one scale: B takes scales that differ."""
    rank = max(one.rank for one in weights)
    scale = max((one.scale for one in weights if bool(one.B.any())), default=1.0)
    return [padded(replace(one, B=one.B * (one.scale / scale), scale=scale), rank) for one in weights]


def _short(named: Sequence[str], wholes: Sequence[Place]) -> list[str]:
    """The last two words of each name, where these name nothing else."""
    known = {f"{place.path}.{place.parameter}" for place in wholes}
    ends = {name: ".".join(name.split(".")[-2:]) for name in named}
    clear = all(name in named for name in known for end in ends.values() if name.endswith(f".{end}"))
    return sorted(set(ends.values())) if clear else sorted(named)
