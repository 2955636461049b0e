"""What a model is made of: its blocks, the role of every operation, tied weights, and the language of targets.

`anatomy(model)` reads a model once, from the names and the structure of its modules (see `structure`); a model
on the meta device will do.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import nn

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.quantized import entries
from deltaworks.core.structure import KINDS, LINEAR, Place, features_of, find_places, kind_of, parent_of

__all__ = ["KINDS", "LINEAR", "Anatomy", "Place", "anatomy"]


@dataclass(frozen=True)
class _Node:
    """What the printed tree says about one module."""

    kind: str  # class name
    shapes: str
    own: int  # elements of the parameters that the module itself owns
    listed: bool  # a ModuleList or Sequential, whose children are named by index


@dataclass
class Anatomy:
    """The places of one model, in the order of its modules.

    Attributes:
        places: every operation that a tuner can stand around.
        tied: groups of parameter names that share storage.
        blocks: stack -> paths of its blocks, in order.
        model: class name of the model, for messages.
    """

    places: list[Place]
    tied: list[list[str]] = field(default_factory=list)
    blocks: dict[str, list[str]] = field(default_factory=dict)
    model: str = "the model"
    _nodes: dict[str, _Node] = field(default_factory=dict, repr=False)
    _total: int = field(default=0, repr=False)  # parameters of the model, tied ones counted once

    def select(self, targets: str | Sequence[str], kinds: Collection[str] | None = None) -> list[Place]:
        """The places that `targets` names, without duplicates, in model order.

        An item of `targets` (separated by commas, or a list) is one of

        - a role, with globs: ``attention.[qv]``, ``mlp``; a role includes all below it
        - ``linear``: every linear inside the blocks that all tokens pass, so neither routers nor experts, of which
          each sees few tokens and all together would multiply what is trained (peft's "all-linear" is the same)
        - ``experts``: every matrix of every expert; ``mlp.experts.up``, ``mlp.experts.down`` are some of them
        - ``all``: every place
        - a path glob or the end of a path: ``model.layers.*.up_proj``, ``q_proj``; experts are counted in it,
          ``experts.3.down_proj``, where ``experts.down_proj`` is that of all
        - ``re:`` and a regular expression that the whole path must match

        and any but the last may carry ``stack:`` in front and ``@3``, ``@0-5``, ``@-1`` (blocks) behind.
        Of a fused projection the whole is given, unless only a part of it is named.

        Args:
            targets: what to select.
            kinds: keep places of these kinds only (of all kinds if None).

        Raises:
            UserError: an item matches nothing, or only places of other kinds.
        """
        items = _split(targets) if isinstance(targets, str) else [item.strip() for item in targets]
        if not items:
            raise UserError("no target is given: name a role such as 'attention.q', a path, or 'linear'")
        chosen = {place for item in items for place in self._match(item, kinds)}
        return _prefer_wholes(place for place in self.places if place in chosen)

    def groups(self) -> list[list[Place]]:
        """Linears that read the same input: (q, k, v), (gate, up) and the (k, v) of cross-attention.

        A second q of one attention reads another input: the text beside the image of a joint attention.
        """
        gathered: dict[tuple[str, str, int], list[Place]] = {}
        met: Counter[tuple[str, str]] = Counter()
        for place in self.places:
            section, _, part = place.role.partition(".")
            wanted = {"attention": "qkv", "cross_attention": "kv"}.get(section, ())
            if place.kind in LINEAR and place.part is None and (part in wanted or place.role in _GATED):
                parent = place.path.rpartition(".")[0]
                gathered.setdefault((parent, section, met[parent, place.role]), []).append(place)
                met[parent, place.role] += 1
        return [group for group in gathered.values() if len(group) > 1]

    def __str__(self) -> str:
        return "\n".join(_tree(self))

    def _match(self, item: str, kinds: Collection[str] | None) -> list[Place]:
        found = self._named(item)
        if not found:
            raise UserError(f"target {item!r} matches nothing in {self.model}: {self._hint(item)}")
        kept = [place for place in found if kinds is None or place.kind in kinds]
        if not kept:
            has = " and ".join(sorted({place.kind for place in found}))
            raise UserError(
                f"target {item!r} matches only places of kind {has} in {self.model}, "
                f"but kind {' or '.join(sorted(kinds or ()))} is needed"
            )
        return kept

    def _named(self, item: str) -> list[Place]:
        """The places that one item names, whatever their kind; a fused projection's parts only if named."""
        if item.startswith("re:"):
            try:
                pattern = re.compile(item[3:])
            except re.error as error:
                raise UserError(f"target {item!r} is not a regular expression: {error}") from None
            return _prefer_wholes(p for p in self.places if any(map(pattern.fullmatch, _names(p))))
        written = _ITEM.fullmatch(item)
        if written is None:
            raise UserError(f"target {item!r} cannot be read: write 'stack:role@0-5', a path or 're:...'")
        places = self.places
        if written["stack"] is not None:
            places = [place for place in places if place.stack == written["stack"]]
        if written["first"] is not None:
            places = self._in_blocks(places, int(written["first"]), int(written["last"] or written["first"]))
        return _prefer_wholes(_by_name(places, written["name"]))

    def _in_blocks(self, places: list[Place], first: int, last: int) -> list[Place]:
        kept = []
        for place in places:
            if place.block is not None:
                count = len(self.blocks[place.stack])
                start, stop = (index + count if index < 0 else index for index in (first, last))
                if start <= place.block <= stop:
                    kept.append(place)
        return kept

    def _hint(self, item: str) -> str:
        """What the user may have meant by an item that matches nothing."""
        if item.startswith("re:"):
            return "a regular expression must match a whole path" + (
                f", such as {self.places[-1].path!r}" if self.places else ""
            )
        written = _ITEM.fullmatch(item)
        assert written is not None
        name, stack = written["name"], written["stack"]
        if stack is not None and stack not in self.blocks:
            known = [known for known in self.blocks if known]
            return nearest(stack, known) if known else "it has one stack of blocks, write the role alone"
        homes = {place.stack for place in _by_name(self.places, name)}
        if stack is not None and homes and stack not in homes:
            return (
                "only "
                + " and ".join(repr(home) if home else "the model outside its stacks" for home in sorted(homes))
                + " has it"
            )
        if written["first"] is not None and homes:
            sizes = ", ".join(f"{stack or 'blocks'} 0-{len(paths) - 1}" for stack, paths in self.blocks.items())
            return f"it has {sizes}" if sizes else "it has no blocks"
        if name == "linear":
            return "it has no linear layer" + (" in its blocks" if self.blocks else "")
        fused = f"{name.partition('.')[0]}.{_FUSED.get(name.partition('.')[2], '')}"
        if any(place.role == fused for place in self.places):
            return f"here it is fused into {fused!r} and cannot be told apart"
        named = {place.role for place in self.places} | {place.path.rpartition(".")[2] for place in self.places}
        return nearest(name, {word for word in named if word and not word.isdigit()} | {"linear", "all"})


_GATED = ("mlp.gate", "mlp.up")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_SPELLED = {
    "attention.qkv": "attention.[qkv]",
    "cross_attention.qkv": "cross_attention.[qkv]",
    "experts": "mlp.experts",
}
_ITEM = re.compile(r"(?:(?P<stack>\w+):)?(?P<name>[^@:]+)(?:@(?P<first>-?\d+)(?:-(?P<last>-?\d+))?)?")


def backbone(found: Anatomy, places: Iterable[Place]) -> list[Place]:
    """The places without the output head's own; a head that is tied to an embedding moves with it."""
    places = [place for place in places if place.whole]
    own = {place.path for place in places if place.role != "head"}
    owners = [{parent_of(name) for name in group} for group in found.tied]
    tied = {path for group in owners if group & own for path in group}
    return [place for place in places if place.role != "head" or place.path in tied]


def _split(targets: str) -> list[str]:
    """Items between commas; a comma inside brackets belongs to a regular expression."""
    parts = re.split(r",(?![^\[({]*[\])}])", targets)
    return [part.strip() for part in parts if part.strip()]


def _by_name(places: Sequence[Place], name: str) -> list[Place]:
    if name == "all":
        return list(places)
    if name == "linear":
        inside = (place for place in places if place.block is not None or place.role == "linear")
        return [place for place in inside if _is_dense(place)]
    for pattern in (name, _SPELLED.get(name)):
        if pattern:
            found = [p for p in places if fnmatchcase(p.role, pattern) or fnmatchcase(p.role, pattern + ".*")]
            if found:
                return found
    return [p for p in places if any(fnmatchcase(f".{own}", f"*.{name}") or own == name for own in _names(p))]


def _is_dense(place: Place) -> bool:
    """Whether a place is a linear layer that every token passes: no router, and none of several experts."""
    return (place.kind in LINEAR or (place.kind == "matrix" and place.expert is None)) and place.role != "mlp.router"


def _names(place: Place) -> Iterator[str]:
    """What a path in a target may be: the module, and the name of one of its matrices with or without the expert."""
    yield place.path
    if place.name != place.path:
        yield place.name
        yield f"{place.path}.{place.parameter}"


def _prefer_wholes(places: Iterable[Place]) -> list[Place]:
    """Drop the parts of fused projections that are there as a whole."""
    places = list(places)
    wholes = {(place.name, place.kind) for place in places if place.part is None}
    return [place for place in places if place.part is None or (place.name, place.kind) not in wholes]


def anatomy(model: nn.Module) -> Anatomy:
    """Find the places of a model; nothing is run and no weight is read."""
    places, blocks = find_places(model)
    nodes = {path: _node(module) for path, module in model.named_modules()}
    total = sum(map(entries, model.parameters()))
    return Anatomy(places, _tied(model), blocks, type(model).__name__, nodes, total)


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one tensor, or views of one storage from the same element on.

    A module that is found under two paths has the first.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    owned = (module.named_parameters(path, recurse=False) for path, module in model.named_modules())
    for name, parameter in chain.from_iterable(owned):
        key: tuple[int, int] = (id(parameter), 0)
        if parameter.device.type != "meta" and type(parameter.data) is torch.Tensor and parameter.numel():
            key = (parameter.untyped_storage().data_ptr(), int(parameter.storage_offset()))
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


# ---- the printed tree -----------------------------------------------------------------------------------------------


def _node(module: nn.Module) -> _Node:
    own = dict(module.named_parameters(recurse=False))
    kind = kind_of(module)
    if kind in LINEAR:
        shapes = "{} -> {}".format(*features_of(module))
    else:
        sizes = {name: " x ".join(map(str, parameter.shape)) or "1" for name, parameter in own.items()}
        plain = kind in ("norm", "embedding", "conv2d")
        shapes = sizes.get("weight", "") if plain else ", ".join(f"{name} {size}" for name, size in sizes.items())
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    return _Node(type(module).__name__, shapes, sum(map(entries, own.values())), listed)


@dataclass
class _Line:
    label: str
    what: str
    roles: str
    count: int
    below: list["_Line"]

    def alike(self) -> tuple[object, ...]:
        """Everything but the name, to fold lines that differ in their index alone."""
        return (self.what, self.roles, self.count, tuple((line.label, line.alike()) for line in self.below))


def _tree(found: Anatomy) -> list[str]:
    """The lines of the tree: name, class or shape, roles, parameters."""
    roles: dict[str, list[str]] = {}
    for place in found.places:
        roles.setdefault(place.path, []).append(
            place.role.rpartition(".")[2] + "[{}:{}]".format(*place.part) if place.part else place.role
        )
    children: dict[str, list[str]] = {}
    for path in found._nodes:
        if path:
            children.setdefault(parent_of(path), []).append(path)

    def line(path: str) -> _Line:
        node = found._nodes[path]
        below = [inner for child in children.get(path, ()) for inner in lines(child)]
        if node.listed:
            below = _folded(below)
        what = node.shapes if path not in children and node.shapes else node.kind
        count = node.own + sum(inner.count for inner in below)
        return _Line(path.rpartition(".")[2], what, " ".join(dict.fromkeys(roles.get(path, ()))), count, below)

    def lines(path: str) -> list[_Line]:
        """The lines of a module: none if it holds no place, its children's if it only wraps them."""
        this = line(path)
        if not this.roles and (found._nodes[path].listed or len(this.below) < 2):
            return [replace(inner, label=f"{this.label}.{inner.label}") for inner in this.below]
        return [this]

    root = line("")
    rows = [("", _Line(found.model, "", root.roles, found._total, [])), *_drawn(root.below, "")]
    name_width = max(len(stem + row.label) for stem, row in rows) + 2
    what_width = max(len(row.what) for _, row in rows) + 2
    role_width = max(len(row.roles) for _, row in rows) + 2
    count_width = max(len(f"{row.count:,}") for _, row in rows)
    drawn = [
        f"{stem + row.label:<{name_width}}{row.what:<{what_width}}{row.roles:<{role_width}}{row.count:>{count_width},}"
        for stem, row in rows
    ]
    return drawn + ["tied: " + " = ".join(names) for names in found.tied]


def _folded(lines: list[_Line]) -> list[_Line]:
    """Fold runs of numbered lines that are alike: "0-11  12 x BertLayer", counted together."""
    runs: list[list[_Line]] = []
    for line in lines:
        if runs and line.label.isdigit() and runs[-1][-1].alike() == line.alike():
            runs[-1].append(line)
        else:
            runs.append([line])
    return [
        run[0]
        if len(run) == 1
        else replace(
            run[0],
            label=f"{run[0].label}-{run[-1].label}",
            what=f"{len(run)} x {run[0].what}",
            count=sum(line.count for line in run),
        )
        for run in runs
    ]


def _drawn(lines: list[_Line], indent: str) -> Iterator[tuple[str, _Line]]:
    for line in lines:
        last = line is lines[-1]
        yield indent + ("└─ " if last else "├─ "), line
        yield from _drawn(line.below, indent + ("   " if last else "│  "))
