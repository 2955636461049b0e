"""A configuration of huggingface/peft as ours, for one model: which method stands where, with which options."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, NamedTuple

from torch import nn

from deltaworks.core.anatomy import Anatomy, anatomy
from deltaworks.core.board import board_of
from deltaworks.core.errors import UserError
from deltaworks.core.places import Place
from deltaworks.core.registry import Composition, Config, find
from deltaworks.core.ties import owners
from deltaworks.store.foreign import lost, targets
from deltaworks.store.foreign.peft_fields import check_values
from deltaworks.store.foreign.peft_matrices import expression, parameters, projections
from deltaworks.store.foreign.peft_table import TYPES
from deltaworks.store.foreign.peft_types import Type

COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision",
    "target_modules", "task_type", "trainable_token_indices",
)  # fmt: skip
"""Fields of every type, which are read here or change no output."""
STARTS = ("init_lora_weights", "init_ia3_weights", "init_weights")
"""Fields that choose the values before training."""
REWRITING = ("olora", "corda", "loftq", "lora_ga", "pissa_niter")
"""Starts that overwrite the base, which the checkpoint does not hold."""
EMPTY: tuple[Any, ...] = (None, False, 0, "", "none", [], {})


class Plan(NamedTuple):
    """What a configuration of theirs is for one model."""

    row: Type
    config: Config
    also: list[str]
    seed: int | None


def as_plain(spec: Any) -> dict[str, Any]:
    """The fields of a configuration object, or of a mapping, as JSON data."""
    data = spec if isinstance(spec, Mapping) else spec.to_dict()
    return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def row_of(data: Mapping[str, Any]) -> Type:
    """The row of the table that a configuration belongs to. Raises UserError for none, and for malformed fields."""
    kind = str(data.get("peft_type")).upper()
    rows = [row for row in TYPES if row.peft == kind]
    if not rows:
        held = ", ".join(dict.fromkeys(row.peft for row in TYPES))
        raise UserError(f"peft's {kind} is no method here: of its types there are {held}")
    fitting = [row for row in rows if all(data.get(key) == value for key, value in row.says.items())]
    row = max(fitting, key=lambda row: len(row.says))
    check_values(row, data)
    return row


def plan(data: Mapping[str, Any], model: nn.Module, kept: Collection[str] = (), *, fresh: bool = False) -> Plan:
    """What a configuration means for a model.

    ``kept`` are more modules that are trained in full. A ``fresh`` adapter must name modules that there are; a
    checkpoint's tensors say that better. Raises UserError for what we do not hold.
    """
    row = row_of(data)
    _check_fields(row, data)
    found = anatomy_of(model)
    paths = targets.module_names(model)
    whole = [*targets.saved_whole(data, paths), *kept]
    also = [path for path in paths if any(_inside(path, outer) for outer in whole) and _owns(model, path)]
    members: list[Config] = []
    chosen: list[str] = []
    if row.whole:
        members.append(find(row.method)(**_options(row, data, None, model)))
    else:
        chosen = targets.targeted(data, model, paths)
        named = parameters(data, found)
        if fresh:
            targets.check_named(data, chosen, model, paths)
            patterns = [own.pattern for own in row.fields if own.pattern]
            targets.check_patterns(data, patterns, [*chosen, *map(_matched, named)])
        members += _members(row, data, model, found, chosen, named)
    members += _biases(data, model, found, [path for path in paths if path not in also], chosen)
    seed = int(data.get(*row.seed)) if row.seed else None
    exact = [targets.exactly(found, path) for path in also]
    exact += [f"{targets.exactly(found, path)}#{rows}" for path, rows in _rows(data, model, found, paths)]
    return Plan(row, members[0] if len(members) == 1 else Composition(members=members), exact, seed)


def anatomy_of(model: nn.Module) -> Anatomy:
    """As the adapters that are there already see the model."""
    board = board_of(model)
    return next(iter(board.deltas.values())).anatomy if board and board.deltas else anatomy(model)


def _check_fields(row: Type, data: Mapping[str, Any]) -> None:
    known = {*COMMON, *STARTS, *row.idle, *row.says, *row.sited, *(row.seed or ())[:1]}
    known |= {name for own in row.fields for name in (own.theirs, own.pattern)}
    start = next((data[name] for name in STARTS if name in data), True)
    if isinstance(start, str) and start.startswith(REWRITING):
        raise UserError(
            f"the start {start!r} overwrote the base, which this adapter does not hold: let peft write it with "
            "path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    for key, value in data.items():
        if key in known or value in EMPTY:
            continue
        if key not in row.training:
            raise UserError(f"peft's {row.peft} with {key}={value!r} has no counterpart here")
        lost(f"{key}={value!r} acts in training alone and is not held here")


def _members(
    row: Type, data: Mapping[str, Any], model: nn.Module, found: Anatomy, chosen: list[str], named: list[Place]
) -> list[Config]:
    """One configuration for each set of modules, and of named parameters, that have the same options."""
    config = find(row.method)
    kinds = [kind for kind in config.kinds if kind in row.names]
    places = {place.path: place for place in found.places if place.part is None and place.kind in {*kinds} - {"matrix"}}
    named = [*named, *(place for path in chosen for place in projections(model, found, path) if "matrix" in kinds)]
    inside = {place.path for place in named}
    if odd := [path for path in chosen if path not in places and path not in inside]:
        what = type(model.get_submodule(odd[0])).__name__
        raise UserError(f"peft's {row.peft} at {odd[0]!r} ({what}) has no counterpart here ({len(odd)} such modules)")
    if not chosen and not named:
        raise UserError(f"target_modules={data.get('target_modules')!r} names no module of {type(model).__name__}")
    groups: dict[str, tuple[dict[str, Any], list[str], list[Place]]] = {}
    for place in [*(places[path] for path in chosen if path in places), *named]:
        options = _options(row, data, place, model)
        _, modules, matrices = groups.setdefault(json.dumps(options, sort_keys=True), (options, [], []))
        if place.kind == "matrix":
            matrices.append(place)
        else:
            modules.append(place.path)
    members = []
    for options, modules, matrices in groups.values():
        items = [targets.expression(found, modules, kinds)] if modules else []
        items += expression(found, matrices) if matrices else []
        members.append(config(targets=",".join(items), **options))
    return members


def _options(row: Type, data: Mapping[str, Any], place: Place | None, model: nn.Module) -> dict[str, Any]:
    """Our options for one module: the general ones, what a pattern says of it, and what the row adds."""
    options = {}
    for own in row.fields:
        value = data.get(own.theirs, own.default)
        if place is not None and own.pattern:
            value = targets.patterned(data.get(own.pattern) or {}, _matched(place), value)
        options[own.ours] = own.read(value)
    return options | row.site(data, place, model)


def _matched(place: Place) -> str:
    """What their patterns compare: the path of the module, or the parameter that ``target_parameters`` names."""
    if place.kind != "matrix" or place.parameter == "in_proj_weight":
        return place.path
    return place.path.removesuffix(".out_proj") if place.role != "mlp.router" and place.expert is None else _full(place)


def _full(place: Place) -> str:
    return f"{place.path}.{place.parameter}"


def _biases(
    data: Mapping[str, Any], model: nn.Module, found: Anatomy, paths: list[str], chosen: list[str]
) -> list[Config]:
    """The method that trains the biases which ``bias`` names, if there are any."""
    which = data.get("bias") or "none"
    if which == "none":
        return []
    config = find("bitfit")
    kinds = {place.path: place for place in found.places if place.kind in config.kinds and place.role != "head"}
    own = [
        path
        for path in (paths if which == "all" else chosen)
        if path in kinds and model.get_submodule(path)._parameters.get("bias") is not None
    ]
    return [config(targets=targets.expression(found, own, config.kinds))] if own else []


def rows_of(data: Mapping[str, Any], model: Any, paths: list[str]) -> dict[str, list[int]]:
    """The rows that ``trainable_token_indices`` names, by the path of their embedding. Raises UserError."""
    given = data.get("trainable_token_indices") or {}
    if not isinstance(given, dict):
        inputs = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        own = [path for path in paths if model.get_submodule(path) is inputs]
        return dict.fromkeys(own[:1], given)
    found = {path: rows for name, rows in given.items() for path in paths if path.endswith(name)}
    if missing := [name for name in given if not any(path.endswith(name) for path in paths)]:
        raise UserError(f"trainable_token_indices: {missing[0]!r} names no module of {type(model).__name__}")
    return found


def _rows(data: Mapping[str, Any], model: nn.Module, found: Anatomy, paths: list[str]) -> list[tuple[str, str]]:
    """Targets with their rows; peft trains those of a tied weight in all its owners, whatever else is tied."""
    items = []
    for path, rows in rows_of(data, model, paths).items():
        tied = [other for other, _ in owners(found, path, "weight")]
        items += [(own, ",".join(map(str, sorted(rows)))) for own in (path, *tied)]
    return items


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _owns(model: nn.Module, path: str) -> bool:
    return any(parameter is not None for parameter in model.get_submodule(path)._parameters.values())


def usual(model: nn.Module, row: Type, what: str) -> list[str] | None:
    """The modules that peft takes for a model of this family where a field names none, if it has such."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft.utils import constants
    except ImportError:
        return None
    known = getattr(constants, f"TRANSFORMERS_MODELS_TO_{row.peft.replace('_', '')}_{what}_MAPPING", {})
    return list(known[family]) if family in known else None
