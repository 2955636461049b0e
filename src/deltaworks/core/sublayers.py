"""The residual sub-layers of a block: where the residual stream is read, where it is added to, and its norm.

A sub-layer is found from its output projection outwards: the largest module around it that is the sub-layer's alone
and does not add the residual itself. All paths are relative to the block.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from deltaworks.core import families
from deltaworks.core.families import SECTIONS
from deltaworks.core.paths import ancestors, contains, join, parent_of
from deltaworks.core.places import Place, arguments_of

_READERS = (".q", ".qkv", ".up", ".gate_up")  # roles of what reads the input of a sub-layer


def sublayers(
    within: Mapping[str, nn.Module], weights: Mapping[str, str], norms: Mapping[str, str], post_norm: bool
) -> Iterator[Place]:
    """The sub-layers of a block: where each is entered and left, and the norm of its sum.

    Args:
        within: the modules of the block.
        weights: the role of each of its weights.
        norms: the sub-layer of each of its norms.
        post_norm: whether its norms come after the residual sums, as far as the model around it tells.
    """
    norm_first = getattr(within[""], "norm_first", None)  # torch's own layers say so
    post_norm = post_norm if norm_first is None else not norm_first
    post_norm = post_norm and not any(families.before_sublayer(path) for path in norms)
    for section in SECTIONS:
        own = [path for path, role in weights.items() if role.partition(".")[0] == section]
        foreign = [path for path in weights if path not in own] + [p for p, s in norms.items() if s != "other"]
        readers = [path for path in own if weights[path].endswith(_READERS)] or own
        mine = [path for path, of in norms.items() if of == section]
        bodies = {_climb(within, closing, foreign): closing for closing in _closings(own, weights)}
        whole = [body for body in bodies if any(contains(body, path) for path in readers)]
        # several where a block has two of a section: text beside image, attention there and back
        for number, body in enumerate(whole if len(whole) > 1 else list(bodies)[-1:]):
            closing, leaving = bodies[body], _exit(within, section, body)
            entry = body if body in whole else _climb(within, readers[0], [*foreign, closing])
            left = [path for path in mine if path != leaving][number:]
            norm = next((path for path in left if _sums(path, closing, body, post_norm)), None)
            yield Place(leaving, section, "sublayer", entry=entry if entry != leaving else None, after_norm=norm)


def _closings(own: Sequence[str], weights: Mapping[str, str]) -> list[str]:
    """The modules that compute outputs of sub-layers: output projections, or the experts."""
    for ending in (".qkv", ".o", ".down", ".experts"):
        found = [path for path in own if weights[path].endswith(ending)]
        found = [path for path in found if ending != ".qkv" or f"{path}.out_proj" in own]
        if found:
            return found
    return []


def _climb(within: Mapping[str, nn.Module], path: str, foreign: Iterable[str]) -> str:
    """The outermost module around `path` that holds nothing foreign and adds no residual itself."""
    foreign = list(foreign)
    for owner in ancestors(path):
        adds = arguments_of(within[owner]) & {"residual", "input_tensor"}
        if not owner or adds or any(contains(owner, other) for other in foreign):
            break
        if not isinstance(within[owner], nn.ModuleList):
            path = owner
    return path


def _exit(within: Mapping[str, nn.Module], section: str, body: str) -> str:
    """The last module before the residual sum: a dropout or scale of this sub-layer alone, or its body."""
    parent = parent_of(body)
    children = [name for name, _ in within[parent].named_children()]
    if not parent:
        return next(iter(families.exits(section, children)), body)
    dropouts = (join(parent, name) for name in families.DROPOUTS if name in children)
    return next((path for path in dropouts if isinstance(within[path], nn.Dropout)), body)


def _sums(norm: str, closing: str, body: str, post_norm: bool) -> bool:
    """Whether a norm is applied to the sum of its sub-layer's output and the residual."""
    if parent_of(norm):
        beside = parent_of(norm) == parent_of(body)
        return beside and (body == closing or post_norm)
    return post_norm
