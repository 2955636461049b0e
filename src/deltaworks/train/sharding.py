"""FSDP2 (accelerate's ``fsdp_version=2``) around a model with an adapter: what is sharded, and what stays whole.

The frozen base is sharded as without an adapter. The adapter's float32 tensors are sharded with the blocks that they
stand in, each uniform in dtype as FSDP2 asks. Two kinds of adapters stay whole in every process instead: those that
decide over time by all of a tensor, and those that share one trained tensor between blocks.
"""

from __future__ import annotations

from typing import Any

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Procedure, Procedures


def decides(delta: Delta) -> bool:
    """Whether its procedure acts between the passes, rather than before the training alone."""
    procedure = delta.procedure
    members = procedure.members if isinstance(procedure, Procedures) else [procedure]
    hooks = ("loss", "gradients", "stepped", "end")
    return any(getattr(type(member), hook) is not getattr(Procedure, hook) for member in members for hook in hooks)


def needs_whole(delta: Delta) -> bool:
    """Whether every process must hold this adapter whole, beside its part of the base."""
    owners: dict[int, set[str]] = {}
    for item in delta.attached:
        for parameter in item.tuner.parameters():
            owners.setdefault(id(parameter), set()).add(item.place.path)
    return decides(delta) or any(len(paths) > 1 for paths in owners.values())


def keep_whole(delta: Delta, plugin: Any) -> None:
    """Let FSDP2 leave an adapter out: to be called before ``accelerator.prepare`` with accelerate's FSDP plugin.

    Its gradients are then each process's own: ``Team.average`` makes them one after every backward pass. Raises
    UserError for a method that needs the base whole, and where the weights are loaded by the first process alone.
    """
    if limit := delta.limit("sharded"):
        raise UserError(f"{delta.config} cannot be trained while FSDP2 shards the base: {limit}")
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            f"{delta.config} stays whole in every process, which accelerate cannot do while only the first one loads "
            "the weights: set cpu_ram_efficient_loading to false"
        )
    if isinstance(plugin.ignored_modules, str):
        raise UserError("give ignored_modules as modules, not as a pattern: the adapter's are added to them")
    plugin.ignored_modules = [*(plugin.ignored_modules or []), *delta.tuners()]
