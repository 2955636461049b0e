"""Merging: writing an adapter's change into the weights of its model, and taking it out again bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.weights import base_tensors, effective

Values = dict[str, dict[str, Any]]
"""Parameters by the path of their module and their name in it."""


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


def write(model: nn.Module, values: Values, tied: list[list[str]]) -> Values:
    """Put merged values in place, in the dtypes of the base, and return the parameters that stood there."""
    before: Values = {}
    for path, changed in values.items():
        module = model.get_submodule(path)
        before[path] = {name: module._parameters[name] for name in changed}
        for name, value in changed.items():
            old = module._parameters[name]
            new = value if old is None else value.to(device=old.device, dtype=old.dtype)
            module._parameters[name] = nn.Parameter(new, requires_grad=False)
    for group in tied:
        owners = [(model.get_submodule(path), name) for path, _, name in (full.rpartition(".") for full in group)]
        for owner, name in owners[1:]:
            owner._parameters[name] = owners[0][0]._parameters[owners[0][1]]
    return before


def put_back(model: nn.Module, before: Values) -> None:
    """The parameters that ``write`` returned, as the same objects."""
    for path, parameters in before.items():
        model.get_submodule(path)._parameters.update(parameters)
