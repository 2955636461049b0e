"""Where the operations of a model lie: kinds, stacks of blocks, roles, residual sub-layers.

Names that are known live in `families`; what no name tells is inferred from shapes, from the order of the
modules and from the arguments of their `forward`. Nothing is run and no weight is read.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType

from torch import nn

from deltaworks.core import families
from deltaworks.core.families import ATTENTION, MLP, SECTIONS

KINDS = (
    "linear",
    "conv1d",
    "conv2d",
    "embedding",
    "norm",
    "sublayer",
    "keyvalue",
    "block",
    "trunk",
    "parameters",
)
LINEAR = ("linear", "conv1d")


@dataclass(frozen=True)
class Place:
    """One operation of the model that a tuner can stand around.

    Attributes:
        path: dotted path of the module that is wrapped; "" is the model itself.
        role: what the operation does, such as "attention.q".
        kind: one of `KINDS`.
        stack: "encoder", "decoder", "vision", "text", ... where the model has several stacks of blocks, else "".
        block: index of the block inside its stack; None outside the blocks.
        part: [start, stop) of the output features, for one projection inside a fused one.
        entry: for a sub-layer whose input is read by another module than `path`: that module's path.
        after_norm: for a sub-layer of a post-norm block: the norm applied to (its output + the residual).
    """

    path: str
    role: str
    kind: str
    stack: str = ""
    block: int | None = None
    part: tuple[int, int] | None = None
    entry: str | None = None
    after_norm: str | None = None


def find_places(model: nn.Module) -> tuple[list[Place], dict[str, list[str]]]:
    """Every place of a model in the order of its modules, and stack -> paths of its blocks."""
    modules = dict(model.named_modules())
    stacks = _stacks(modules)
    blocks = {stack: [path for paths in lists.values() for path in paths] for stack, lists in stacks.items()}
    trunks = _trunks(modules, stacks)
    order = {path: index for index, path in enumerate(modules)}

    places = [Place(path, "trunk", "trunk", stack) for path, stack in trunks.items()]
    inside: set[str] = set()
    for stack, lists in stacks.items():
        index = 0
        for container, paths in lists.items():
            post_norm = not _has_final_norm(modules, container, trunks)
            for path in paths:
                within = _within(modules, path)
                inside.update(_join(path, relative) for relative in within)
                found = _block_places(within, post_norm)
                places += [_placed(place, path, stack, index) for place in found]
                index += 1
    containers = [container for lists in stacks.values() for container in lists]
    places += _outside_places({p: m for p, m in modules.items() if p not in inside}, containers, trunks, order)
    places.sort(key=lambda place: order[place.path])
    return places, blocks


def _placed(place: Place, path: str, stack: str, index: int) -> Place:
    """A place found inside a block, as a place of the model."""
    return replace(
        place,
        path=_join(path, place.path),
        stack=stack,
        block=index,
        entry=None if place.entry is None else _join(path, place.entry),
        after_norm=None if place.after_norm is None else _join(path, place.after_norm),
    )


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def _contains(outer: str, path: str) -> bool:
    """Whether `path` is the module `outer` or lies inside it."""
    return not outer or path == outer or path.startswith(outer + ".")


def _ancestors(path: str) -> Iterator[str]:
    """The modules around a path, innermost first, down to the model itself ("")."""
    while path:
        path = parent_of(path)
        yield path


def _within(modules: Mapping[str, nn.Module], path: str) -> dict[str, nn.Module]:
    """The modules of a block by their path inside it; "" is the block."""
    return dict(modules[path].named_modules())


def _around(within: Mapping[str, nn.Module], path: str) -> tuple[list[str], list[str]]:
    """Names and classes of the modules around a path inside a block, without the block itself."""
    owners = [owner for owner in _ancestors(path) if owner]
    return [owner.rpartition(".")[2] for owner in owners], [type(within[owner]).__name__ for owner in owners]


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    return any(re.search(r"Norm(\dd)?$", kind.__name__) for kind in type(module).__mro__)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module that owns weights, None of one that owns none."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return "conv1d"
    if next(module.parameters(recurse=False), None) is None:
        return None
    return "norm" if _is_norm(module) else "parameters"


def features_of(module: nn.Module) -> tuple[int, int]:
    """(input, output) features of a linear or of transformers' Conv1D, whose weight is [in, out]."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def _code(forward: object) -> CodeType | None:
    """The code of a `forward` below its decorators; None of one that is not written in Python."""
    return getattr(inspect.unwrap(forward) if callable(forward) else None, "__code__", None)


def _arguments(kind: type[nn.Module]) -> set[str]:
    """Names of the arguments that `forward` takes, in a module class or in one that it extends."""
    codes = (_code(ancestor.__dict__.get("forward")) for ancestor in kind.__mro__)
    return {
        name
        for code in codes
        if code is not None
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    }


def _calls_attention_interface(kind: type[nn.Module]) -> bool:
    """Whether a class computes attention through transformers' registry of attention functions."""
    codes = (_code(ancestor.__dict__.get("forward")) for ancestor in kind.__mro__)
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _is_keyvalue(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "_attn_implementation") and _calls_attention_interface(type(module))


# ---- stacks and trunks ----------------------------------------------------------------------------------------------


def _stacks(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, list[str]]]:
    """stack -> list of blocks -> paths of its blocks.

    The lists are the innermost ones whose members hold attention and something else; in a model without any,
    the longest list of two or more modules of one class that hold linears or convolutions, and those like it.
    """
    lists = {path: module for path, module in modules.items() if isinstance(module, nn.ModuleList | nn.Sequential)}
    kept: list[str] = []
    for path in reversed(lists):
        nested = any(_contains(path, other) for other in kept)
        if not nested and any(_is_transformer_block(child) for child in lists[path]):
            kept.insert(0, path)
    members = {path: [_join(path, name) for name, _ in lists[path].named_children()] for path in kept}
    if not kept:
        alike = {path: children for path, module in lists.items() if len(children := _alike(path, module)) > 1}
        inner = [path for path in alike if not any(other != path and _contains(path, other) for other in alike)]
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
        if path:
            names, classes = _around(within, path)
            if isinstance(inner, nn.MultiheadAttention):
                attention = True
            elif kind_of(inner) in LINEAR:
                found = families.linear_part(families.section_of(names, classes), path)
                attention = attention or (found is not None and found[0] != MLP)
                matrix = matrix or found is None or found[0] == MLP
            elif any(parameter.dim() > 2 for parameter in inner.parameters(recurse=False)):
                matrix = True
    return attention and matrix


def _alike(path: str, module: nn.Module) -> list[str]:
    """Paths of the children of the commonest class that hold linears or convolutions."""
    children = {
        _join(path, name): type(child)
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


_STACK_WORDS = (
    (r"vision|visual|image", "vision"),
    (r"text|language", "text"),
    (r"audio|speech", "audio"),
    (r"decoder", "decoder"),
    (r"encoder", "encoder"),
)
_MODEL_INPUTS = {"input_ids", "pixel_values", "input_features", "input_values"}


def _trunks(modules: Mapping[str, nn.Module], stacks: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """trunk -> its stack: around each stack the innermost module that takes the model's input, or embeddings."""
    trunks: dict[str, str] = {}
    for stack, lists in stacks.items():
        for container in lists:
            owners = list(_ancestors(container))
            takes = {owner: _arguments(type(modules[owner])) for owner in owners}
            trunk = next((owner for owner in owners if takes[owner] & _MODEL_INPUTS), None)
            if trunk is None:
                trunk = next((owner for owner in owners if "inputs_embeds" in takes[owner]), None)
            if trunk is not None:
                trunks[trunk] = stack if trunks.get(trunk, stack) == stack else ""
    return trunks


def _has_final_norm(modules: Mapping[str, nn.Module], container: str, trunks: Mapping[str, str]) -> bool:
    """Whether a norm follows the stack: it does behind pre-norm blocks, and never behind post-norm ones."""
    for owner in _ancestors(container):
        children = dict(modules[owner].named_children())
        if "pos_conv_embed" in children:  # wav2vec2 and its kin, whose encoder norm comes before or after
            return "StableLayerNorm" in type(modules[owner]).__name__
        if any(_is_norm(child) and not _is_early_norm(name) for name, child in children.items()):
            return True
        if owner in trunks:
            break
    return False


def _is_early_norm(name: str) -> bool:
    return "embed" in name or name.startswith("pre")


# ---- inside a block -------------------------------------------------------------------------------------------------


def _block_places(within: Mapping[str, nn.Module], post_norm: bool) -> list[Place]:
    """The places of one block, their paths relative to it."""
    weights, parts = _linear_roles(within)
    norms = _norm_roles(within, weights)
    places = [Place("", "block", "block"), *_sublayers(within, weights, norms, post_norm)]
    for path, module in within.items():
        names, classes = _around(within, path)
        if path and _is_keyvalue(module):
            section = families.section_of([*names, path.rpartition(".")[2]], [*classes, type(module).__name__])
            places.append(Place(path, f"{ATTENTION if section == MLP else section}.kv", "keyvalue"))
        kind = kind_of(module)
        if path in weights:
            # a MultiheadAttention reads the weights of its projections without calling them
            called = kind in LINEAR and not isinstance(within[parent_of(path)], nn.MultiheadAttention)
            places.append(Place(path, weights[path], kind if called and kind else "parameters"))
            places += [Place(path, role, kind or "parameters", part=part) for role, part in parts.get(path, ())]
        elif path in norms and kind == "norm":
            places.append(Place(path, f"norm.{norms[path]}", "norm"))
        elif kind == "embedding":
            places.append(Place(path, families.embedding_role(path), kind))
        elif kind is not None:
            places.append(Place(path, "other", kind))
    return places


_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d)
_Parts = dict[str, list[tuple[str, tuple[int, int]]]]


def _linear_roles(within: Mapping[str, nn.Module]) -> tuple[dict[str, str], _Parts]:
    """Roles of the linears, attentions and experts of a block, and the parts of its fused projections."""
    roles: dict[str, str] = {}
    for path, module in within.items():
        if not path:
            continue
        names, classes = _around(within, path)
        section = families.section_of(names, classes)
        if isinstance(module, nn.MultiheadAttention):
            own = families.section_of([*names, path.rpartition(".")[2]], [type(module).__name__])
            roles[path] = f"{own}.qkv"
        elif kind_of(module) in LINEAR:
            found = families.linear_part(section, path)
            roles[path] = ".".join(found) if found else _role_by_shape(section, module)
        elif kind_of(module) == "parameters" and section == MLP and not isinstance(module, _CONVOLUTIONS):
            if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
                roles[path] = "mlp.experts"
            elif re.search(r"gate|router", path.rpartition(".")[2]):
                roles[path] = "mlp.router"
    parts: _Parts = {}
    for path, role in list(roles.items()):
        beside = {roles[other] for other in roles if parent_of(other) == parent_of(path)}
        bare = not role.startswith(("attention.", "cross_attention.")) and beside & {"attention.q", "attention.qkv"}
        if bare and "attention.o" not in beside and families.linear_part(ATTENTION, path) == (ATTENTION, "o"):
            roles[path] = "attention.o"
    for path, role in list(roles.items()):
        siblings = {other: roles[other] for other in roles if parent_of(other) == parent_of(path)}
        roles[path], parts[path] = _fused(within, path, role, siblings)
    return roles, parts


def _role_by_shape(section: str, module: nn.Module) -> str:
    """The role of a linear whose name says nothing."""
    inputs, outputs = features_of(module)
    if section != MLP:
        return f"{section}.qkv" if outputs == 3 * inputs else f"{section}.other"
    if inputs == outputs:
        return "linear"
    return "mlp.up" if outputs > inputs else "mlp.down"


def _fused(
    within: Mapping[str, nn.Module], path: str, role: str, siblings: Mapping[str, str]
) -> tuple[str, list[tuple[str, tuple[int, int]]]]:
    """The role of a projection among its siblings, and the parts of a fused one with their output features."""
    section, _, part = role.partition(".")
    module = within[path]
    if role == "mlp.gate" and "mlp.up" not in siblings.values():
        return "mlp.up", []
    if part not in ("qkv", "up", "gate_up") or kind_of(module) not in LINEAR:
        return role, []
    closing = next((p for p, r in siblings.items() if r in (f"{section}.o", f"{section}.down")), None)
    outputs = features_of(module)[1]
    width = features_of(within[closing])[0] if closing else 0
    if section == MLP:
        if part != "gate_up" and outputs != 2 * width:
            return role, []
        half = outputs // 2
        known = families.GATE_FIRST.fullmatch(path)
        return "mlp.gate_up", [("mlp.gate", (0, half)), ("mlp.up", (half, outputs))] if known else []
    owner = type(within[parent_of(path)]).__name__
    if f"{section}.q" in siblings.values():  # GPT-2's cross-attention: c_attn holds k and v only
        half = outputs // 2
        return role, [(f"{section}.k", (0, half)), (f"{section}.v", (half, outputs))]
    head_by_head = getattr(within[parent_of(path)], "multi_query", True) is False
    rest = outputs - width
    if not width or rest <= 0 or rest % 2 or head_by_head or not families.in_order(path, owner):
        return role, []
    middle = width + rest // 2
    ends = (("q", (0, width)), ("k", (width, middle)), ("v", (middle, outputs)))
    return role, [(f"{section}.{name}", span) for name, span in ends]


def _norm_roles(within: Mapping[str, nn.Module], weights: Mapping[str, str]) -> dict[str, str]:
    """The sub-layer that each norm of a block belongs to, "other" for the norms of queries and keys."""
    children = [name for name, _ in within[""].named_children()]
    roles = {}
    for path, module in within.items():
        if not path or not _is_norm(module):
            continue
        parent, _, name = path.rpartition(".")
        roles[path] = families.norm_section(path, children)
        if parent:
            held = {role.partition(".")[0] for other, role in weights.items() if _contains(parent, other)}
            generic = name.lower() in ("layernorm", "layer_norm") and len(held) == 1
            roles[path] = held.pop() if generic else "other"
    unnamed = [path for path, section in roles.items() if not parent_of(path) and section == families.UNKNOWN]
    present = [s for s in SECTIONS if any(role.startswith(s + ".") for role in weights.values())]
    if len(unnamed) == len(present):  # one norm for each sub-layer, in their order
        roles.update(zip(unnamed, present, strict=True))
    return {path: section if section in present else "other" for path, section in roles.items()}


def _sublayers(
    within: Mapping[str, nn.Module], weights: Mapping[str, str], norms: Mapping[str, str], post_norm: bool
) -> Iterator[Place]:
    """The residual sub-layers of a block: where each is entered and left, and the norm of its sum."""
    norm_first = getattr(within[""], "norm_first", None)  # torch's own layers say so
    post_norm = post_norm if norm_first is None else not norm_first
    post_norm = post_norm and not any(families.before_sublayer(path) for path in norms)
    for section in SECTIONS:
        own = [path for path, role in weights.items() if role.partition(".")[0] == section]
        closing = _closing(own, weights)
        if closing is None:
            continue
        foreign = [path for path in weights if path not in own] + [p for p, s in norms.items() if s != "other"]
        body = _climb(within, closing, foreign)
        leaving = _exit(within, section, body)
        readers = [path for path in own if weights[path].endswith(_READERS)]
        if any(_contains(body, path) for path in readers or own):
            entry = body
        else:
            entry = _climb(within, (readers or own)[0], [*foreign, closing])
        norm = next(
            (
                path
                for path, of in norms.items()
                if of == section and path != leaving and _sums(path, closing, body, post_norm)
            ),
            None,
        )
        yield Place(leaving, section, "sublayer", entry=entry if entry != leaving else None, after_norm=norm)


_READERS = (".q", ".qkv", ".up", ".gate_up")


def _closing(own: Sequence[str], weights: Mapping[str, str]) -> str | None:
    """The module that computes a sub-layer's output: its output projection, or the experts."""
    for ending in (".qkv", ".o", ".down", ".experts"):
        for path in reversed(own):
            if weights[path].endswith(ending) and (ending != ".qkv" or f"{path}.out_proj" in own):
                return path
    return None


def _climb(within: Mapping[str, nn.Module], path: str, foreign: Iterable[str]) -> str:
    """The outermost module around `path` that holds nothing foreign and adds no residual itself."""
    foreign = list(foreign)
    for owner in _ancestors(path):
        adds = _arguments(type(within[owner])) & {"residual", "input_tensor"}
        if not owner or adds or any(_contains(owner, other) for other in foreign):
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
    dropouts = (_join(parent, name) for name in families.DROPOUTS if name in children)
    return next((path for path in dropouts if isinstance(within[path], nn.Dropout)), body)


def _sums(norm: str, closing: str, body: str, post_norm: bool) -> bool:
    """Whether a norm is applied to the sum of its sub-layer's output and the residual."""
    if parent_of(norm):
        beside = parent_of(norm) == parent_of(body)
        return beside and (body == closing or post_norm)
    return post_norm


# ---- outside the blocks ---------------------------------------------------------------------------------------------


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
        inner = max((trunk for trunk in trunks if _contains(trunk, path)), key=len, default=None)
        if containers:
            role = _outside_role(path, kind, modules, containers, inner, bool(trunks), order)
        elif kind in LINEAR:
            role = "head" if path == linears[-1] and len(linears) > 1 else "linear"
        else:
            role = {"embedding": families.embedding_role(path), "norm": "norm.other"}.get(kind, "other")
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
    owners = [path, *_ancestors(path)]
    branch = [owner for owner in owners if not any(_contains(owner, stack) for stack in containers)]
    home = next(owner for owner in owners if owner not in branch)  # innermost module that holds a stack too
    names = [owner.rpartition(".")[2].lower() for owner in branch]
    words = " ".join([*names, *(type(modules[owner]).__name__.lower() for owner in branch)])
    tower = home if trunk is None else trunk
    after = order[path] > max(order[stack] for stack in containers if _contains(tower, stack))
    if not branch:
        return "other"
    if kind == "embedding":
        return families.embedding_role(path)
    if "pool" in words:
        return "pooler"
    if has_trunks and trunk is None and "embed" not in words:
        return "other" if re.search(r"projector|connector", words) else "head"
    if kind == "norm":
        siblings = dict(modules[parent_of(path)].named_children())
        early = len(branch) > 1 or _is_early_norm(names[0]) or "rel_embeddings" in siblings
        convolved = "pos_conv_embed" in siblings and "Stable" not in type(modules[home]).__name__
        return "norm.embedding" if early or convolved else "norm.final"
    if after and kind != "parameters":
        return "head"
    if kind == "conv2d":
        module = modules[path]
        return "embedding.patch" if getattr(module, "stride", 0) == getattr(module, "kernel_size", 1) else "other"
    if kind == "parameters":
        return _parameters_role(modules[path])
    return "embedding.projection" if "embed" in words else "other"


def _parameters_role(module: nn.Module) -> str:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if any("pos" in name for name in names):
        return "embedding.position"
    return "embedding.token" if any(re.search(r"token|class_embed", name) for name in names) else "other"
