"""Adapters whose tensors are spread over processes, by FSDP2 (as DTensor) or by DeepSpeed ZeRO-3: made whole.

Only the adapter's own tensors are ever gathered, never the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltaworks.core.quantized import entries

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


def is_dtensor(tensor: Any) -> bool:
    """Whether FSDP2 (or tensor parallelism) holds this tensor in pieces."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_partitioned(tensor: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 holds this parameter in pieces now; it is empty then."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def is_sharded(delta: Delta) -> bool:
    """Whether processes share the tensors of an adapter, so that none has it whole."""
    return any(is_dtensor(p) or is_partitioned(p) for tuner in delta.tuners() for p in tuner.parameters())


def size_of(parameter: Tensor) -> int:
    """How many values a parameter has, in all processes together, however they are packed."""
    return int(getattr(parameter, "ds_numel", entries(parameter)))


@contextmanager
def gathered(parameters: list[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Partitioned parameters of ZeRO-3 whole for a while; ``write``: what the first process puts in them stays."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


@contextmanager
def whole(delta: Delta, *, write: bool = False) -> Iterator[bool]:
    """The tuners with whole parameters instead of shards; all processes enter and leave it together.

    ``write`` puts what the parameters hold at the end back into the shards. Yields whether this process is the one
    that speaks for all: the first one, or any where nothing is sharded, and then nothing changes.
    """
    if not is_sharded(delta):
        yield True
        return
    owners = [module for tuner in delta.tuners() for module in tuner.modules()]
    held = list(dict.fromkeys(p for module in owners for p in module._parameters.values() if p is not None))
    with gathered(held, write=write):
        full = {parameter: _full(parameter) for parameter in held if is_dtensor(parameter)}
        _exchange(owners, full)
        try:
            yield dist.get_rank() == 0
        finally:
            _exchange(owners, {new: old for old, new in full.items()})
        if write:
            for parameter, values in full.items():
                _fill(parameter, values)
    dist.barrier()


def _full(parameter: Any) -> nn.Parameter:
    return nn.Parameter(parameter.detach().full_tensor(), requires_grad=parameter.requires_grad)


def _exchange(owners: list[nn.Module], replacing: dict[nn.Parameter, nn.Parameter]) -> None:
    for module in owners:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in replacing:
                module._parameters[name] = replacing[parameter]


@torch.no_grad()
def _fill(parameter: Any, values: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    # every process has all values: each takes its own piece, and nothing is sent
    parameter.copy_(distribute_tensor(values.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None))
