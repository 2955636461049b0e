"""Merging: writing an adapter's change into the weights of its model, and taking it out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.places import kind_of
from deltaworks.core.quantized import is_quantized
from deltaworks.core.replacing import plain_linear, quantized_again, replace
from deltaworks.core.weights import base_tensors, effective, to_matrix
from deltaworks.core.wrapping import stand_in

Values = dict[str, dict[str, Any]]
"""Parameters by the path of their module and their name in it."""
Before = dict[str, dict[str, Any] | nn.Module]
"""What stood in the model: parameters, or a whole quantized layer, by the path of the module."""


def merged_values(model: nn.Module, paths: list[str], adapter: str) -> Values:
    """The changed parameters, computed in float32 or wider. Raises UserError where one is not finite."""
    return {path: _merged(model.get_submodule(path), path, adapter) for path in paths}


def _merged(module: Any, path: str, adapter: str) -> dict[str, Tensor]:
    wide = {
        name: None if tensor is None else tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in base_tensors(module).items()
    }
    with torch.no_grad():
        changed = effective(list(module.deltas[adapter]), wide)
    values = {name: value for name, value in changed.items() if value is not None and value is not wide.get(name)}
    for name, value in values.items():
        if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise UserError(f"merging {adapter!r} would make {path}.{name} hold values that are not finite")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in values.items()}


def check_ties(tied: list[list[str]], merged: Values) -> None:
    """Raises UserError where only one owner of a tied weight would change, or its owners differently."""
    for group in tied:
        values = [merged.get(path, {}).get(name) for path, _, name in (full.rpartition(".") for full in group)]
        changed = [value for value in values if value is not None]
        if changed and not (len(changed) == len(values) and all(torch.equal(changed[0], v) for v in changed[1:])):
            raise UserError(
                f"{group[0]} and {group[1]} are one tied weight and only one of them is tuned: "
                "keep the adapter unmerged, or untie the model first (config.tie_word_embeddings=False)"
            )


def write(model: nn.Module, values: Values, tied: list[list[str]], *, requantize: bool = False) -> Before:
    """Put merged values in place, in the dtypes of the base, and return what stood there.

    A quantized linear gives way to a plain one, or with ``requantize`` to one with the codes of the merged weight.
    Raises UserError where a weight cannot be quantized again, and changes nothing.
    """
    layers = {}
    for path, changed in values.items():
        module: Any = model.get_submodule(path)
        if "weight" in changed and is_quantized(module) and kind_of(module) == "linear":
            make = quantized_again if requantize else plain_linear
            layers[path] = make(model, module, changed["weight"])
    before: Before = {}
    for path, changed in values.items():
        module = model.get_submodule(path)
        if path in layers:
            before[path] = module
            stand_in(layers[path], module)
            replace(model, module, layers[path])
            _set(layers[path], {name: value for name, value in changed.items() if name != "weight"})
        else:
            before[path] = _set(module, changed)
    for group in tied:
        owners = [(model.get_submodule(path), name) for path, _, name in (full.rpartition(".") for full in group)]
        for owner, name in owners[1:]:
            owner._parameters[name] = owners[0][0]._parameters[owners[0][1]]
    return before


def _set(module: Any, changed: dict[str, Any]) -> dict[str, Any]:
    before = {name: module._parameters[name] for name in changed}
    for name, value in changed.items():
        old = module._parameters[name]
        new = value if old is None else value.to(device=old.device, dtype=old.dtype)
        module._parameters[name] = nn.Parameter(new, requires_grad=False)
    return before


def rounding(model: nn.Module, values: Values) -> float:
    """How far an output feature of a merged layer can be from the exact one, for an input of length one."""
    largest = 0.0
    for path, changed in values.items():
        module = model.get_submodule(path)
        stored = base_tensors(module)
        for name, value in changed.items():
            gap = stored[name].to(value) - value
            gap = to_matrix(str(kind_of(module)), gap) if name == "weight" else gap[..., None]
            largest = max(largest, float(torch.linalg.vector_norm(gap, dim=-1).max()))
    return largest


def put_back(model: nn.Module, before: Before) -> None:
    """What ``write`` returned, as the same objects."""
    for path, old in before.items():
        if isinstance(old, nn.Module):
            replace(model, model.get_submodule(path), old)
        else:
            model.get_submodule(path)._parameters.update(old)


@contextmanager
def plain_meanwhile(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters, where plain layers take the place of quantized linears for a while: of those, the plain weights.

    That needs the memory of these layers in the model's dtype.
    """
    wanted = {id(parameter) for parameter in parameters}
    plain: dict[int, tuple[Any, Any]] = {}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if id(weight) in wanted and is_quantized(module):
            plain[id(weight)] = (module, plain_linear(model, module, base_tensors(module)["weight"]))
    for module, new in plain.values():
        stand_in(new, module)
        replace(model, module, new)
    try:
        yield [plain[id(parameter)][1].weight if id(parameter) in plain else parameter for parameter in parameters]
    finally:
        for module, new in plain.values():
            replace(model, new, module)
