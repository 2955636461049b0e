"""The matrices inside modules that multiply them in their own way: those of experts, and of a MultiheadAttention.

Experts hold theirs in one parameter for each step, [experts, out, in] or [experts, in, out], whatever function of
transformers multiplies them; a MultiheadAttention has q, k and v in one, and reads the weight of its output projection
without calling it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from deltaworks.core import families
from deltaworks.core.families import MLP
from deltaworks.core.paths import name_of, parent_of
from deltaworks.core.places import Place

EXPERTS = f"{MLP}.experts"


def matrices(modules: Mapping[str, nn.Module], place: Place) -> Iterator[Place]:
    """The matrices of the module at a place of kind "parameters"; none of a module that is not known to have any."""
    if place.kind != "parameters":
        return
    module = modules[place.path]
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module, replace(place, kind="matrix"))
    elif is_read(modules.get(parent_of(place.path)), place.path) or _is_router(module, place):
        yield replace(place, kind="matrix")
    elif place.role == EXPERTS:
        yield from _experts(module, replace(place, kind="matrix"))


def is_read(parent: nn.Module | None, path: str) -> bool:
    """Whether a module's parent reads its parameters without calling it."""
    return isinstance(parent, nn.MultiheadAttention) and name_of(path) == "out_proj"


def _is_router(module: nn.Module, place: Place) -> bool:
    weight = module._parameters.get("weight")
    return place.role == f"{MLP}.router" and weight is not None and weight.dim() == 2


def _attention(module: nn.MultiheadAttention, place: Place) -> Iterator[Place]:
    section = place.role.removesuffix(".qkv")
    if module.in_proj_weight is None:  # keys or values of another width than the queries
        for part in "qkv":
            yield replace(place, role=f"{section}.{part}", parameter=f"{part}_proj_weight")
        return
    place, width = replace(place, parameter="in_proj_weight"), module.embed_dim
    yield place
    for index, part in enumerate("qkv"):
        yield replace(place, role=f"{section}.{part}", part=(index * width, (index + 1) * width))


def _experts(module: nn.Module, place: Place) -> Iterator[Place]:
    stacked = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
    turned = _turned(module, stacked)
    concatenated = getattr(module, "is_concatenated", True)
    for name, weight in stacked.items():
        known = families.linear_part(MLP, name) or families.linear_part(MLP, name_of(place.path))
        role = f"{EXPERTS}.{known[1]}" if known else EXPERTS
        half = weight.shape[2 if turned else 1] // 2
        for expert in range(weight.shape[0]):
            whole = replace(place, role=role, parameter=name, expert=expert, turned=turned)
            yield whole
            if role.endswith(".gate_up") and concatenated:
                yield replace(whole, role=f"{EXPERTS}.gate", part=(0, half))
                yield replace(whole, role=f"{EXPERTS}.up", part=(half, 2 * half))


def _turned(module: nn.Module, stacked: Mapping[str, Tensor]) -> bool:
    """Whether the matrices are stored as [in, out], from what the module says or from what fits together."""
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    shapes = {part[1]: w.shape[1:] for n, w in stacked.items() if (part := families.linear_part(MLP, n)) is not None}
    first, down = shapes.get("gate_up", shapes.get("up")), shapes.get("down")
    if first is None or down is None:
        return False
    return first[0] == down[1] and first[1] != down[0]
