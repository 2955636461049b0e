"""Putting an adapter's tuners around the modules of its model, and taking them off again without a trace."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaworks.core.board import Board, Tap, base_modules
from deltaworks.core.lean.neighbours import gate_forward, is_activation, lean_forward
from deltaworks.core.matrices import is_read
from deltaworks.core.paths import parent_of
from deltaworks.core.places import Place
from deltaworks.core.quantized import is_quantized
from deltaworks.core.sites import is_causal
from deltaworks.core.weights import base_tensors
from deltaworks.core.wrapping import is_wrapped, unwrap, wrap

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


def install(delta: Delta) -> None:
    """Wrap what an adapter stands around, freeze the base, and let the adapter act alone."""
    board, model = delta.board, delta.model
    if not board.deltas:
        _freeze(delta)
    board.deltas[delta.name] = delta
    for item in delta.attached:
        place, module = item.place, model.get_submodule(item.place.path)
        for where, tuner in item.all:
            _add(delta, where, tuner)
        if place.kind == "sublayer" and place.entry is not None and "_entry_tap" not in module.__dict__:
            tap = Tap("input")
            module.__dict__["_entry_tap"] = tap
            _tap(model.get_submodule(place.entry), tap, board)
        if place.kind == "trunk":
            _prepare_trunk(delta, module, place)
    delta.reshaped()
    for watched, tap in delta._taps:
        _tap(watched, tap, board)
    board.show([delta.name])


def _freeze(delta: Delta) -> None:
    board, model = delta.board, delta.model
    board.frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    # torch's encoder would give its layers nested tensors, which only their fast path can take
    board.nesting = [module for module in model.modules() if getattr(module, "use_nested_tensor", False)]
    for module in board.nesting:
        module.use_nested_tensor = False  # type: ignore[assignment]
    # running statistics are the base's too: used as they are, and not moved by training
    board.counting = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    for module in board.counting:
        module.eval()
        module.train = _stay  # type: ignore[method-assign, assignment]
    gates = {parent_of(place.path) for place in delta.anatomy.places if place.role.endswith((".gate", ".gate_up"))}
    for path, module in list(model.named_modules()):  # gradients go through all of them
        if is_quantized(module) or lean_forward(module) is not None:
            wrap(module, board)
            if parent_of(path) in gates and is_activation(module):
                module._lean = gate_forward(module)  # type: ignore[assignment]


def _stay(mode: bool = True) -> None:
    """In place of a module's ``train``: it stays in evaluation."""


def _add(delta: Delta, place: Place, tuner: nn.Module) -> None:
    """Wrap the module at a place, and give it a tuner."""
    module: Any = delta.model.get_submodule(place.path)
    wrap(module, delta.board)
    if delta.name not in module.deltas:
        module.deltas[delta.name] = nn.ModuleList()
    module.deltas[delta.name].append(tuner)
    reader: Any = delta.model.get_submodule(parent_of(place.path))
    if is_read(reader, place.path):
        wrap(reader, delta.board)
        reader._reads = [*(other for other in reader._reads if other is not module), module]


def _tap(module: nn.Module, tap: Tap, board: Board) -> None:
    wrap(module, board)
    module._taps.append(tap)  # type: ignore[union-attr, operator]


def _prepare_trunk(delta: Delta, module: Any, place: Place) -> None:
    places, model = delta.anatomy.places, delta.model
    decoders = [other for other in places if other.kind == "trunk" and other.stack == "decoder"]
    module._keeps_inserted = place.stack == "encoder" and bool(decoders)
    if module._keeps_inserted:
        for other in decoders:
            decoder: Any = model.get_submodule(other.path)
            wrap(decoder, delta.board)
            decoder._widens = True
    module._counts_positions = is_causal(module) and "position_ids" in module._argument_names
    for other in places:
        if other.role == "embedding.position" and other.stack == place.stack and other.kind == "embedding":
            table: Any = model.get_submodule(other.path)
            padding = getattr(table, "padding_idx", None)
            if padding is not None and "position_ids" in module._argument_names:
                module._first_position = padding + 1
            unused = getattr(table, "offset", 0) if padding is None else padding + 1
            module._longest = base_tensors(table)["weight"].shape[0] - unused


def uninstall(delta: Delta) -> None:
    """Take an adapter off. With the last one all wrappers go, and the base is as trainable as it was."""
    board, model = delta.board, delta.model
    del board.deltas[delta.name]
    board.show(name for name in board.wanted if name != delta.name)
    if board.banks is not None:
        board.banks.forget(delta.name)
    for path in delta.paths():
        module: Any = model.get_submodule(path)
        del module.deltas[delta.name]
        note_kinds(module, delta.name)
    wrapped = _concerned(delta)
    taps = {id(tap) for _, tap in delta._taps}
    for module in wrapped:
        if "_entry_tap" in module.__dict__ and not len(module.deltas):
            taps.add(id(module.__dict__.pop("_entry_tap")))
    inserting = any(module._keeps_inserted and len(module.deltas) for module in wrapped)
    for module in wrapped:
        module._taps = [tap for tap in module._taps if id(tap) not in taps]
        module._widens = module._widens and inserting
        unwrap(module)
    if not board.deltas:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(board.frozen.get(name, True))
        for module in board.nesting:
            module.use_nested_tensor = True
        for module in board.counting:
            del module.train
            module.train(model.training)


def _concerned(delta: Delta) -> list[Any]:
    """The wrapped modules that an adapter may leave something at: all, of the last one and where trunks are widened."""
    model, kinds = delta.model, {item.place.kind for item in delta.attached}
    found: list[Any] = [module for module, _ in delta._taps]
    if not delta.board.deltas or "trunk" in kinds:
        found = [module for _, module in base_modules(model)]
    else:
        paths = {path for own in delta.paths() for path in (own, parent_of(own))}
        paths |= {item.place.entry for item in delta.attached if item.place.entry is not None}
        found += map(model.get_submodule, paths)
    return [module for module in {id(module): module for module in found}.values() if is_wrapped(module)]


def note_kinds(module: Any, name: str) -> None:
    """Note what tuners an adapter has at a module. Where all adapters have the same, one graph can serve them."""
    for kind, names in list(module._kinds.items()):
        names.discard(name)
        if not names:
            del module._kinds[kind]
    if name in module.deltas:
        module._kinds.setdefault(tuple(map(_kind, module.deltas[name])), set()).add(name)
    module._alike = len(module._kinds) < 2


def _kind(tuner: Any) -> Hashable:
    """Everything that a graph takes as fixed."""
    homes = (home for module in tuner.modules() for home in (module._parameters, module._buffers))
    shapes = tuple((name, value.shape) for home in homes for name, value in home.items() if value is not None)
    return (type(tuner), tuner.place, repr(tuner.config), shapes, tuner.constants())
