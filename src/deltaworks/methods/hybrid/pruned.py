"""Modules of which only some entries of the parameters are kept: values and positions instead of whole matrices.

The class of the module changes to a subclass of its own in which a kept parameter is a property, made dense when it is
read. So any tuner can be pruned, and none of them knows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.methods.selective.entries import ascending


class Kept(nn.Module):
    """``values`` [k] at the flat positions ``index`` [k] of a tensor of a shape; the others are zero."""

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.values, self.shape = nn.Parameter(values), shape
        self.register_buffer("index", index.to(torch.int32))

    def dense(self) -> Tensor:
        return self.values.new_zeros(self.shape.numel()).index_add(0, self.index, self.values).view(self.shape)


@functools.cache
def prunable_class(plain: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class in which the parameters ``names`` may be kept in part."""

    def shown(name: str) -> property:
        def get(self: Any) -> Tensor:
            return self.kept[name].dense() if name in self.kept else self._parameters[name]

        return property(get)

    namespace: dict[str, Any] = {name: shown(name) for name in names} | {"prunable": names}
    if issubclass(plain, Tuner):

        def restore(self: Any, tensors: Mapping[str, Tensor]) -> None:
            tensors = _kept_again(self, tensors)
            every = Tuner.stored(self).keys()
            self.fill(tensors, every) if tensors.keys() == every else plain.restore(self, tensors)

        namespace["restore"] = restore
    return type(plain.__name__, (plain,), namespace)


def make_prunable(tuners: Iterable[Tuner]) -> bool:
    """Let the matrices that a checkpoint holds be kept in part; whether there are any. Nothing changes yet."""
    tuners, found = list(tuners), False
    held = {id(p) for t in tuners for stored in [t.stored()] for name, p in t.named_parameters() if name in stored}
    for module in {id(module): module for tuner in tuners for module in tuner.modules()}.values():
        own = module.named_parameters(recurse=False)
        names = tuple(name for name, parameter in own if parameter.dim() > 1 and id(parameter) in held)
        if names:
            found = True
            plain: Any = type(module)
            module.kept = nn.ModuleDict()
            module.__class__ = prunable_class(plain, names)
    return found


def matrices(tuner: Tuner) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each whole matrix of a prunable tuner: its path, its module, its name there and itself."""
    for path, module in tuner.named_modules():
        for name in getattr(module, "prunable", ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield f"{path}.{name}".lstrip("."), module, name, parameter


def keep(module: Any, name: str, kept: Kept) -> None:
    """Put what is kept in place of the whole parameter."""
    del module._parameters[name]
    module.kept[name] = kept


def _kept_again(tuner: Tuner, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prune a whole tuner as ``tensors`` are, with what it shares with others that were pruned before it."""
    tensors = dict(tensors)
    for path, module, name, parameter in list(matrices(tuner)):
        prefix = f"{path.removesuffix(name)}kept.{name}"
        index, values = (tensors.get(f"{prefix}.{part}") for part in ("index", "values"))
        if index is not None and values is not None:
            if index.shape != values.shape or not ascending(index, parameter.numel()):
                raise UserError(f"{prefix!r} must hold values and their ascending positions below {parameter.numel()}")
            device = parameter.device
            parameter.__dict__["kept"] = Kept(index.to(device), values.to(device, torch.float32), parameter.shape)
        kept = parameter.__dict__.get("kept")
        if kept is not None:
            keep(module, name, kept)
            tensors |= {f"{prefix}.index": kept.index, f"{prefix}.values": kept.values.detach()}
    return tensors
