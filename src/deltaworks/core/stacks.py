"""The skeleton of a model: its stacks of blocks, their names, the trunk around each, and the norm that follows.

Which lists of modules are stacks is told by what they hold (attention beside something else), not by their names;
where nothing looks like attention, by repetition.
"""

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from deltaworks.core import families
from deltaworks.core.families import MLP
from deltaworks.core.paths import ancestors, contains, join
from deltaworks.core.places import LINEAR, arguments_of, is_early_norm, is_norm, kind_of, section_of

_STACK_WORDS = (
    (r"vision|visual|image", "vision"),
    (r"text|language", "text"),
    (r"audio|speech", "audio"),
    (r"decoder", "decoder"),
    (r"encoder", "encoder"),
)
_MODEL_INPUTS = {"input_ids", "pixel_values", "input_features", "input_values"}


def find_stacks(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, list[str]]]:
    """stack -> list of blocks -> paths of its blocks.

    The lists are the innermost ones whose members hold attention and something else; in a model without any,
    the longest list of two or more modules of one class that hold linears or convolutions, and those like it.
    """
    lists = {path: module for path, module in modules.items() if isinstance(module, nn.ModuleList | nn.Sequential)}
    kept: list[str] = []
    for path in reversed(lists):
        nested = any(contains(path, other) for other in kept)
        if not nested and any(_is_transformer_block(child) for child in lists[path]):
            kept.insert(0, path)
    members = {path: [join(path, name) for name, _ in lists[path].named_children()] for path in kept}
    if not kept:
        alike = {path: children for path, module in lists.items() if len(children := _alike(path, module)) > 1}
        inner = [path for path in alike if not any(other != path and contains(path, other) for other in alike)]
        if inner:
            longest = max(inner, key=lambda path: len(alike[path]))
            kind = type(modules[alike[longest][0]])
            members = {path: alike[path] for path in inner if type(modules[alike[path][0]]) is kind}
    stacks: dict[str, dict[str, list[str]]] = {}
    for path, name in _stack_names(list(members)).items():
        stacks.setdefault(name, {})[path] = members[path]
    return stacks


def _is_transformer_block(module: nn.Module) -> bool:
    """Whether a module holds an attention projection, and a weight matrix outside the attention."""
    within = dict(module.named_modules())
    attention = matrix = False
    for path, inner in within.items():
        if not path:
            continue
        if isinstance(inner, nn.MultiheadAttention):
            attention = True
        elif kind_of(inner) in LINEAR:
            found = families.linear_part(section_of(within, path), path)
            attention = attention or (found is not None and found[0] != MLP)
            matrix = matrix or found is None or found[0] == MLP
        elif any(parameter.dim() > 2 for parameter in inner.parameters(recurse=False)):
            matrix = True
    return attention and matrix


def _alike(path: str, module: nn.Module) -> list[str]:
    """Paths of the children of the commonest class that hold linears or convolutions."""
    children = {
        join(path, name): type(child)
        for name, child in module.named_children()
        if kind_of(child) in (None, "parameters")
        and any(kind_of(inner) in (*LINEAR, "conv2d") for inner in child.modules())
    }
    if not children:
        return []
    commonest = Counter(children.values()).most_common(1)[0][0]
    return [child for child, kind in children.items() if kind is commonest]


def _stack_names(paths: list[str]) -> dict[str, str]:
    """A short name for each list of blocks, from the part of its path that the others do not share."""
    if len(paths) < 2:
        return dict.fromkeys(paths, "")
    shared = set.intersection(*(set(path.split(".")) for path in paths))
    names: dict[str, str] = {}
    both: dict[str, str] = {}
    for path in paths:
        words = [word for word in path.split(".") if word not in shared and not word.isdigit()]
        known = [name for pattern, name in _STACK_WORDS if any(re.search(pattern, word.lower()) for word in words)]
        names[path] = next(iter(known or words), "")
        both[path] = "_".join(known)
    # an encoder and a decoder inside one tower: text_encoder, text_decoder
    return {
        path: name if len({both[p] for p in paths if names[p] == name}) < 2 else both[path]
        for path, name in names.items()
    }


def find_trunks(modules: Mapping[str, nn.Module], stacks: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """trunk -> its stack: around each stack the innermost module that takes the model's input, or embeddings."""
    trunks: dict[str, str] = {}
    for stack, lists in stacks.items():
        for container in lists:
            takes = {owner: arguments_of(modules[owner]) for owner in ancestors(container)}
            trunk = next((owner for owner in takes if takes[owner] & _MODEL_INPUTS), None)
            if trunk is None:
                trunk = next((owner for owner in takes if "inputs_embeds" in takes[owner]), None)
            if trunk is not None:
                trunks[trunk] = stack if trunks.get(trunk, stack) == stack else ""
    return trunks


def has_final_norm(modules: Mapping[str, nn.Module], container: str, trunks: Mapping[str, str]) -> bool:
    """Whether a norm follows the stack: it does behind pre-norm blocks, and never behind post-norm ones."""
    for owner in ancestors(container):
        children = dict(modules[owner].named_children())
        if "pos_conv_embed" in children:  # wav2vec2 and its kin, whose encoder norm comes before or after
            return "StableLayerNorm" in type(modules[owner]).__name__
        norms = (name for name, child in children.items() if is_norm(child))
        if any(not is_early_norm(name) and "att" not in name for name in norms):
            return True
        if owner in trunks:
            break
    return False
