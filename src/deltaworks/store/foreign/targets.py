"""Which modules a configuration of huggingface/peft names, and the other way, names for given modules.

Its rules: a text is a regular expression for whole paths, ``all-linear`` every linear but the output; in a list each
entry is a path or the end of one. ``layers_to_transform`` keeps those whose first number is listed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.errors import UserError, nearest
from deltaworks.core.places import LINEAR, kind_of
from deltaworks.core.weights import WEIGHT_KINDS

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft saves in full with every adapter of a task, where the model has them."""

TIED = ("embed_tokens", "lm_head")
"""The embeddings and heads that peft can tie, by their names."""


def module_names(model: nn.Module) -> list[str]:
    """The paths of a model's own modules, without those of adapters."""
    inside = [
        path for path, module in model.named_modules() if path.endswith("deltas") and "_board" in _owner(model, path)
    ]
    return [
        path
        for path, _ in model.named_modules()
        if path and not any(path == own or path.startswith(f"{own}.") for own in inside)
    ]


def _owner(model: nn.Module, path: str) -> Mapping[str, Any]:
    return model.get_submodule(path.rpartition(".")[0]).__dict__


def named(names: Collection[str] | str, path: str) -> bool:
    """Whether one entry of ``names`` is this path or its end; a text is a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def targeted(data: Mapping[str, Any], model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules among ``paths`` that a configuration's ``target_modules`` and its filters name."""
    targets = data.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = _all_linear(model, paths, data)
    else:
        found = [path for path in paths if named(targets or (), path)]
        if layers := _layers(data):
            found = [path for path in found if _layer(path, data.get("layers_pattern")) in layers]
    if excluded := data.get("exclude_modules"):
        found = [path for path in found if not named(excluded, path)]
    kept_whole = data.get("modules_to_save") or []
    return [path for path in found if not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in kept_whole)]


def check_named(data: Mapping[str, Any], found: Sequence[str], model: nn.Module, paths: Sequence[str]) -> None:
    """Raises UserError where an entry of ``target_modules``, or of what takes modules from it, names nothing."""
    targets, of = data.get("target_modules"), type(model).__name__
    for field in ("target_modules", "exclude_modules"):
        names = data.get(field) or []
        for name in [] if isinstance(names, str) else names:
            if not any(named([name], path) for path in paths):
                raise UserError(f"{field}: {name!r} names no module of {of}: {nearest(name, _leaves(paths))}")
    excluded = data.get("exclude_modules")
    if isinstance(excluded, str) and excluded and not any(named(excluded, path) for path in paths):
        raise UserError(f"exclude_modules={excluded!r} names no module of {of}: leave it out")
    held = {_layer(path, data.get("layers_pattern")) for path in paths if named(targets or (), path)}
    for layer in _layers(data):
        if layer not in held:
            known = ", ".join(str(own) for own in sorted(own for own in held if own is not None)) or "none"
            raise UserError(f"layers_to_transform: no target lies in a layer {layer}: those that have one are {known}")
    if targets and not found:
        raise UserError(f"target_modules={targets!r} names no module of {of}")


def check_patterns(data: Mapping[str, Any], fields: Collection[str], adapted: Sequence[str]) -> None:
    """Raises UserError where a pattern gives a value to none of the adapted modules."""
    for field in fields:
        for key in data.get(field) or {}:
            if not any(patterned({key: True}, path, False) for path in adapted):
                raise UserError(f"{field}: {key!r} names no adapted module: {nearest(key, _leaves(adapted))}")


def _leaves(paths: Sequence[str]) -> set[str]:
    return {leaf for leaf in (path.rpartition(".")[2] for path in paths) if not leaf.isdigit()}


def saved_whole(data: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` names, by the end of their paths. Raises UserError for one that is none."""
    names = list(data.get("modules_to_save") or [])
    usual = HEADS.get(str(data.get("task_type")), ())
    names += [name for name in usual if name not in names]
    found = []
    for name in names:
        own = [path for path in paths if path.endswith(name)]
        if not own and name not in usual:
            raise UserError(
                f"modules_to_save: {name!r} names no module: {nearest(name, {p.rpartition('.')[2] for p in paths})}"
            )
        found += own
    return list(dict.fromkeys(found))


def patterned(pattern: Mapping[str, Any], path: str, usual: Any) -> Any:
    """The value that a pattern (regular expressions for the ends of paths) gives one module, else the usual one."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), usual)


def is_tied(data: Mapping[str, Any]) -> bool:
    """Whether peft ties adapters of tied weights: where it is asked to and knows the embedding by its name."""
    chosen, saved = data.get("target_modules") or [], data.get("modules_to_save") or []
    known = [name for name in TIED if isinstance(chosen, str) and named(chosen, name)]
    known += [name for name in (*([] if isinstance(chosen, str) else chosen), *saved) if name.split(".")[-1] in TIED]
    return bool(data.get("ensure_weight_tying")) and bool(known)


def ends(chosen: Sequence[str], paths: Sequence[str]) -> list[str] | str:
    """``target_modules`` for exactly the ``chosen`` ones of ``paths``: ends of names where they suffice, else paths."""
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    for names in (leaves, list(chosen)):
        if {path for path in paths if named(names, path)} == set(chosen):
            return names
    return "|".join(re.escape(path) for path in chosen)


def expression(anatomy: Anatomy, paths: Sequence[str], kinds: Collection[str]) -> str:
    """Our ``targets`` for exactly these modules: ends of names where they suffice, else paths."""
    leaves = ",".join(sorted({path.rpartition(".")[2] for path in paths}))
    if _selected(anatomy, leaves, kinds) == list(paths):
        return leaves
    return ",".join(exactly(anatomy, path) for path in paths)


def exactly(anatomy: Anatomy, path: str) -> str:
    """A target that is this path alone, whatever roles are called."""
    return path if _selected(anatomy, path, WEIGHT_KINDS) == [path] else f"re:{re.escape(path)}"


def _selected(anatomy: Anatomy, targets: str, kinds: Collection[str]) -> list[str]:
    try:
        return list(dict.fromkeys(place.path for place in anatomy.select(targets, kinds)))
    except UserError:  # a name that is a role of another kind
        return []


def _layers(data: Mapping[str, Any]) -> list[int]:
    layers = data.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else list(layers or [])


def _layer(path: str, pattern: str | Sequence[str] | None) -> int | None:
    """The index of the layer that a path lies in: its first number, behind ``pattern`` where that is given."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    for expression in [rf"(?:^|.*?\.){own}\.(\d+)\." for own in patterns] or [r".*?\.[^.]*\.(\d+)\."]:
        if match := re.match(expression, path):
            return int(match[1])
    return None


def _all_linear(model: Any, paths: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """Every linear, without the output layer of a language model or the head of a classifier."""
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [output] if output is not None else []
    if output is None and data.get("task_type") == "SEQ_CLS":
        heads = [head for head in (getattr(model, name, None) for name in ("score", "classifier")) if head is not None]
    linear = [path for path in paths if kind_of(model.get_submodule(path)) in LINEAR]
    return [path for path in linear if not any(model.get_submodule(path) is head for head in heads)]
