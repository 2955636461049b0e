"""Where the operations of a model lie: kinds, stacks of blocks, roles, residual sub-layers.

Names that are known live in `families`; what no name tells is inferred from shapes, from the order of the
modules and from the arguments of their `forward`. Nothing is run and no weight is read.

`stacks` finds the blocks, `blocks` and `sublayers` name what lies inside them; here it is put together with what
lies outside: embeddings, final norms, poolers and heads.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from deltaworks.core import families
from deltaworks.core.blocks import block_places
from deltaworks.core.matrices import matrices
from deltaworks.core.paths import ancestors, contains, join, name_of, parent_of, words_around
from deltaworks.core.places import KINDS, LINEAR, Place, features_of, is_early_norm, kind_of
from deltaworks.core.stacks import find_stacks, find_trunks, has_final_norm

__all__ = ["KINDS", "LINEAR", "Place", "features_of", "find_places", "kind_of", "parent_of"]


def find_places(model: nn.Module) -> tuple[list[Place], dict[str, list[str]]]:
    """Every place of a model in the order of its modules, and stack -> paths of its blocks."""
    modules = dict(model.named_modules())
    stacks = find_stacks(modules)
    trunks = find_trunks(modules, stacks)
    order = {path: index for index, path in enumerate(modules)}

    places = [Place(path, "trunk", "trunk", stack) for path, stack in trunks.items()]
    blocks: dict[str, list[str]] = {stack: [] for stack in stacks}
    inside: set[str] = set()
    for stack, lists in stacks.items():
        for container, paths in lists.items():
            post_norm = not has_final_norm(modules, container, trunks)
            for path in paths:
                within = dict(modules[path].named_modules())
                inside.update(join(path, relative) for relative in within)
                index = len(blocks[stack])
                places += [_placed(place, path, stack, index) for place in block_places(within, post_norm)]
                blocks[stack].append(path)
    outside = {path: module for path, module in modules.items() if path not in inside}
    containers = [container for lists in stacks.values() for container in lists]
    places += _outside_places(outside, containers, trunks, order)
    places += [matrix for place in places for matrix in matrices(modules, place)]
    places.sort(key=lambda place: order[place.path])
    return places, blocks


def _placed(place: Place, path: str, stack: str, index: int) -> Place:
    """A place found inside a block, as a place of the model."""
    return replace(
        place,
        path=join(path, place.path),
        stack=stack,
        block=index,
        entry=None if place.entry is None else join(path, place.entry),
        after_norm=None if place.after_norm is None else join(path, place.after_norm),
    )


def _outside_places(
    modules: Mapping[str, nn.Module],
    containers: Sequence[str],
    trunks: Mapping[str, str],
    order: Mapping[str, int],
) -> list[Place]:
    """Embeddings, final norms, poolers and heads."""
    places = []
    linears = [path for path, module in modules.items() if kind_of(module) in LINEAR]
    for path, module in modules.items():
        kind = kind_of(module)
        if kind is None:
            continue
        if kind == "linear" and isinstance(modules.get(parent_of(path)), nn.MultiheadAttention):
            kind = "parameters"
        inner = max((trunk for trunk in trunks if contains(trunk, path)), key=len, default=None)
        if containers:
            role = _outside_role(path, kind, modules, containers, inner, bool(trunks), order)
        elif kind in LINEAR:
            role = "head" if path == linears[-1] and len(linears) > 1 else "linear"
        else:
            known = {"embedding": families.embedding_role(path), "norm": "norm.other", "conv2d": "conv"}
            role = known.get(kind, "other")
        places.append(Place(path, role, kind, stack="" if inner is None else trunks[inner]))
    return places


def _outside_role(
    path: str,
    kind: str,
    modules: Mapping[str, nn.Module],
    containers: Sequence[str],
    trunk: str | None,
    has_trunks: bool,
    order: Mapping[str, int],
) -> str:
    """The role of a module beside the stacks, from the words around it and from which side of them it lies on."""
    module = modules[path]
    owners = [path, *ancestors(path)]
    branch = [owner for owner in owners if not any(contains(owner, stack) for stack in containers)]
    home = next(owner for owner in owners if owner not in branch)  # innermost module that holds a stack too
    names = [name_of(owner).lower() for owner in branch]
    words = " ".join([*names, *(type(modules[owner]).__name__.lower() for owner in branch)])
    tower = home if trunk is None else trunk
    after = order[path] > max(order[stack] for stack in containers if contains(tower, stack))
    # between the stacks of a model: a stage of a pyramid, the neck of an encoder that a decoder follows
    behind = (contains(home, stack) if trunk is None else order[path] > order[stack] for stack in containers)
    between = not all(behind)
    if not branch:
        return "other"
    if kind in LINEAR and "head" not in words:
        condition = families.condition_role(words_around(modules, path)[: 2 * len(branch)])
        if condition:
            return condition
    if kind == "embedding":
        return families.embedding_role(path)
    if "pool" in words:
        return "pooler"
    if has_trunks and trunk is None and "embed" not in words:
        return "other" if re.search(r"projector|connector", words) else "head"
    if kind == "norm":
        siblings = dict(modules[parent_of(path)].named_children())
        early = is_early_norm(names[0]) or "rel_embeddings" in siblings
        early = early or (len(branch) > 1 and ("embed" in words or not between))
        convolved = "pos_conv_embed" in siblings and "Stable" not in type(modules[home]).__name__
        if early or convolved:
            return "norm.embedding"
        return "norm.other" if between and not (after and len(branch) == 1) else "norm.final"
    if after and not between and kind != "parameters":
        return "head"
    if isinstance(module, nn.Conv2d):
        patches = module.stride == module.kernel_size != (1, 1) or re.search("patch_?embed", words)
        return "embedding.patch" if patches else "conv"
    if kind == "parameters":
        return _parameters_role(module)
    return "embedding.projection" if "embed" in words else "other"


def _parameters_role(module: nn.Module) -> str:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if any("pos" in name for name in names):
        return "embedding.position"
    return "embedding.token" if any(re.search(r"token|class_embed", name) for name in names) else "other"
