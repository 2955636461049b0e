"""What the modules of one block do: roles of its linears, attentions, experts and norms, and parts of fused ones.

All paths are relative to the block. Names that `families` knows decide; shapes and neighbours decide the rest.
"""

import re
from collections.abc import Mapping

from torch import nn

from deltaworks.core import families
from deltaworks.core.families import ATTENTION, MLP, SECTIONS
from deltaworks.core.paths import contains, name_of, parent_of, words_around
from deltaworks.core.places import LINEAR, Place, features_of, is_keyvalue, is_norm, kind_of, section_of
from deltaworks.core.sublayers import sublayers

_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d)
_Parts = list[tuple[str, tuple[int, int]]]  # role and output features of each projection in a fused one


def block_places(within: Mapping[str, nn.Module], post_norm: bool) -> list[Place]:
    """The places of one block.

    Args:
        within: the modules of the block by their path inside it; "" is the block.
        post_norm: whether its norms come after the residual sums, as far as the model around it tells.
    """
    weights, parts = _linear_roles(within)
    norms = _norm_roles(within, weights)
    places = [Place("", "block", "block"), *sublayers(within, weights, norms, post_norm)]
    for path, module in within.items():
        if path and is_keyvalue(module):
            section = section_of(within, path, itself=True)
            places.append(Place(path, f"{ATTENTION if section == MLP else section}.kv", "keyvalue"))
        kind = kind_of(module)
        if path in weights:
            # a MultiheadAttention reads the weights of its projections without calling them
            called = kind in LINEAR and not isinstance(within[parent_of(path)], nn.MultiheadAttention)
            places.append(Place(path, weights[path], kind if called and kind else "parameters"))
            places += [Place(path, role, kind or "parameters", part=part) for role, part in parts[path]]
        elif path in norms and kind == "norm":
            places.append(Place(path, f"norm.{norms[path]}", "norm"))
        elif kind == "embedding":
            places.append(Place(path, families.embedding_role(path), kind))
        elif kind is not None:
            places.append(Place(path, "conv" if kind == "conv2d" else "other", kind))
    return places


def _linear_roles(within: Mapping[str, nn.Module]) -> tuple[dict[str, str], dict[str, _Parts]]:
    """Roles of the linears, attentions and experts of a block, and the parts of its fused projections."""
    roles: dict[str, str] = {}
    for path, module in within.items():
        if not path:
            continue
        section = section_of(within, path)
        if isinstance(module, nn.MultiheadAttention):
            roles[path] = f"{section_of(within, path, itself=True)}.qkv"
        elif kind_of(module) in LINEAR:
            condition = families.condition_role(words_around(within, path)) if section == MLP else None
            found = families.linear_part(section, path)
            roles[path] = condition or (".".join(found) if found else _role_by_shape(section, module))
        elif kind_of(module) == "parameters" and section == MLP and not isinstance(module, _CONVOLUTIONS):
            if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
                roles[path] = "mlp.experts"
            elif re.search(r"gate|router", name_of(path)):
                roles[path] = "mlp.router"
    for path, role in roles.items():
        beside = set(_siblings(roles, path).values())
        bare = not role.startswith(("attention.", "cross_attention.")) and beside & {"attention.q", "attention.qkv"}
        if bare and "attention.o" not in beside and families.linear_part(ATTENTION, path) == (ATTENTION, "o"):
            roles[path] = "attention.o"
    parts: dict[str, _Parts] = {}
    for path, role in roles.items():
        roles[path], parts[path] = _fused(within, path, role, roles)
    return roles, parts


def _siblings(roles: Mapping[str, str], path: str) -> dict[str, str]:
    """The roles of the modules with the same parent, by path, this one's included."""
    return {other: role for other, role in roles.items() if parent_of(other) == parent_of(path)}


def _role_by_shape(section: str, module: nn.Module) -> str:
    """The role of a linear whose name says nothing."""
    inputs, outputs = features_of(module)
    if section != MLP:
        return f"{section}.qkv" if outputs == 3 * inputs else f"{section}.other"
    if inputs == outputs:
        return "linear"
    return "mlp.up" if outputs > inputs else "mlp.down"


def _fused(within: Mapping[str, nn.Module], path: str, role: str, roles: Mapping[str, str]) -> tuple[str, _Parts]:
    """The role of a projection among the others, and the parts of a fused one with their output features."""
    section, _, part = role.partition(".")
    siblings = _siblings(roles, path)
    module = within[path]
    if role == "mlp.gate" and "mlp.up" not in siblings.values():
        return "mlp.up", []
    if part not in ("qkv", "up", "gate_up") or kind_of(module) not in LINEAR:
        return role, []
    behind = list(roles)[list(roles).index(path) :]  # a gated unit may lie in a module of its own
    near = [*siblings, *(other for other in behind if section == MLP)]
    closing = next((other for other in near if roles[other] in (f"{section}.o", f"{section}.down")), None)
    outputs = features_of(module)[1]
    width = features_of(within[closing])[0] if closing else 0
    if section == MLP:
        if part != "gate_up" and outputs != 2 * width:
            return role, []
        half = outputs // 2
        first, second = families.halves(path) or ("", "")
        return "mlp.gate_up", [(f"mlp.{first}", (0, half)), (f"mlp.{second}", (half, outputs))] if first else []
    if f"{section}.q" in siblings.values():  # GPT-2's cross-attention: c_attn holds k and v only
        half = outputs // 2
        return role, [(f"{section}.k", (0, half)), (f"{section}.v", (half, outputs))]
    owner = within[parent_of(path)]
    head_by_head = getattr(owner, "multi_query", True) is False
    rest = outputs - width
    if not width or rest <= 0 or rest % 2 or head_by_head or not families.in_order(path, type(owner).__name__):
        return role, []
    middle = width + rest // 2
    ends = (("q", (0, width)), ("k", (width, middle)), ("v", (middle, outputs)))
    return role, [(f"{section}.{name}", span) for name, span in ends]


def _norm_roles(within: Mapping[str, nn.Module], weights: Mapping[str, str]) -> dict[str, str]:
    """The sub-layer that each norm of a block belongs to, "other" for the norms of queries and keys."""
    children = [name for name, _ in within[""].named_children()]
    roles = {}
    for path, module in within.items():
        if not path or not is_norm(module):
            continue
        parent, _, name = path.rpartition(".")
        if parent:
            held = {role.partition(".")[0] for other, role in weights.items() if contains(parent, other)}
            generic = name.lower() in ("layernorm", "layer_norm") and len(held) == 1
            roles[path] = held.pop() if generic else "other"
        else:
            roles[path] = families.norm_section(path, children)
    unnamed = [path for path, section in roles.items() if not parent_of(path) and section == families.UNKNOWN]
    present = [s for s in SECTIONS if any(role.startswith(s + ".") for role in weights.values())]
    if len(unnamed) == len(present):  # one norm for each sub-layer, in their order
        roles.update(zip(unnamed, present, strict=True))
    return {path: section if section in present else "other" for path, section in roles.items()}
