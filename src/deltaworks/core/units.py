"""Units that can be cut out of a model: attention heads (with grouped queries, whole groups) and feed-forward neurons.

They are found through the roles of the places. A unit is a run of features that some weights write and one reads:
whatever else touches these features makes a model refused, so that what is left computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.errors import UserError
from deltaworks.core.places import LINEAR, Place, features_of
from deltaworks.core.sites import Site


@dataclass(frozen=True)
class Edge:
    """Features of one weight, on its "out" or "in" side: ``size`` for each unit, from ``start`` on."""

    path: str
    side: str
    start: int
    size: int


@dataclass(frozen=True)
class Units:
    """The units of one sub-layer, named after the linear that reads them; ``owner`` is the module that counts them."""

    name: str
    what: str  # "heads" or "neurons"
    count: int
    edges: tuple[Edge, ...]
    owner: str | None = None

    @property
    def size(self) -> int:
        """Features of one unit where they are read."""
        return self.edges[-1].size


def heads(model: nn.Module, anatomy: Anatomy) -> list[Units]:
    """The heads of every attention, in model order. Raises UserError where one of them cannot be cut."""
    return _found(model, anatomy, ("attention", "cross_attention"), "heads", _heads)


def neurons(model: nn.Module, anatomy: Anatomy) -> list[Units]:
    """The neurons of every feed-forward layer, in model order. Raises UserError where one of them cannot be cut."""
    return _found(model, anatomy, ("mlp",), "neurons", _neurons)


def _found(
    model: nn.Module, anatomy: Anatomy, names: Collection[str], what: str, make: Callable[..., Units | str]
) -> list[Units]:
    sections: dict[tuple[str, int, str], list[Place]] = {}
    for place in anatomy.places:
        name = place.role.partition(".")[0]
        if place.block is not None and name in names and place.kind != "sublayer":
            sections.setdefault((place.stack, place.block, name), []).append(place)
    units = []
    for (stack, block, name), places in sections.items():
        made = make(model, anatomy, places)
        if isinstance(made, Units):
            made = _hindered(model, anatomy, made, (stack, block)) or made
        if isinstance(made, str):
            where = f"{name} of block {f'{stack} {block}'.strip()} of {anatomy.model}"
            raise UserError(f"the {what} of the {where} cannot be cut, since {made}: leave them whole with {what}=0")
        units.append(made)
    if not units:
        raise UserError(f"{anatomy.model} has no {what} that could be cut: leave them out with {what}=0")
    return units


def _heads(model: nn.Module, anatomy: Anatomy, places: list[Place]) -> Units | str:
    owner = next((place for place in places if place.kind == "keyvalue"), None)
    parts = _parts(model, places, ("q", "k", "v", "o"), ("qkv",))
    if owner is None:
        return "its attention does not go through transformers' attention functions"
    if parts is None:
        return "its projections are not one q, k, v and o"
    if any(place.role == "embedding.bias" and place.stack == owner.stack for place in anatomy.places):
        return "its position bias is one for all layers, with every head in it"
    (q, q_start, width), (k, k_start, narrow), (v, v_start, other), (o, _, read) = parts
    count, size = Site(owner, model, anatomy, 0, {}).heads
    if width != read or narrow != other or narrow != count * size or width % narrow:
        return f"q, k, v and o of {width}, {narrow}, {other} and {read} features are not made of heads of {size}"
    queries = width // count  # features of the query heads that share one key and value
    writing = (Edge(q, "out", q_start, queries), Edge(k, "out", k_start, size), Edge(v, "out", v_start, size))
    return Units(o, "heads", count, (*writing, Edge(o, "in", 0, queries)), owner.path)


def _neurons(model: nn.Module, anatomy: Anatomy, places: list[Place]) -> Units | str:
    gated = any(place.role in ("mlp.gate", "mlp.gate_up") for place in places)
    parts = _parts(model, places, ("gate", "up", "down") if gated else ("up", "down"), ("gate_up",))
    if parts is None:
        return f"its matrices are not one {'gate, ' if gated else ''}up and down"
    *writing, (down, _, count) = parts
    if any(features != count for _, _, features in writing):
        return "its matrices do not share one number of neurons"
    edges = [Edge(path, "out", start, 1) for path, start, _ in writing]
    return Units(down, "neurons", count, (*edges, Edge(down, "in", 0, 1)))


def _parts(
    model: nn.Module, places: list[Place], names: Collection[str], fused: Collection[str]
) -> list[tuple[str, int, int]] | None:
    """(path, first feature, features) of each named linear: those it writes, for the last one those it reads."""
    found: dict[str, tuple[str, int, int]] = {}
    for place in places:
        name = place.role.partition(".")[2]
        if place.kind == "keyvalue" or name in fused:
            continue
        if place.kind not in LINEAR or name in found or name not in names:
            return None
        inner, out = features_of(model.get_submodule(place.path))
        start, stop = place.part or (0, inner if name in ("o", "down") else out)
        found[name] = (place.path, start, stop - start)
    return [found[name] for name in names] if found.keys() == set(names) else None


def _hindered(model: nn.Module, anatomy: Anatomy, units: Units, block: tuple[str, int]) -> str | None:
    """Why these features cannot be cut."""
    tied = {name for group in anatomy.tied for name in group}
    for edge in units.edges:
        module: Any = model.get_submodule(edge.path)
        if type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point():
            return f"the weight of {edge.path!r} is quantized"
        if f"{edge.path}.weight" in tied:
            return f"the weight of {edge.path!r} is tied to another one"
    widths = {units.count * edge.size for edge in units.edges}
    for place in anatomy.places:
        if (place.stack, place.block) == block and place.role == "norm.other":
            weight = getattr(model.get_submodule(place.path), "weight", None)
            if weight is None or weight.numel() in widths:
                return f"{place.path!r} normalizes them together"
    return None
