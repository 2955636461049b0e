"""Activation checkpointing of any model with blocks: what a block computed is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError, nearest

KINDS = {
    "block": "every block, from its input",
    "selective": "every second block: half of the memory saved, for half of the time",
    "offload": "every block, from its input, which waits in the memory of the host",
}


def check_kind(kind: str | bool | None, device: torch.device) -> None:
    """Raises UserError where ``kind`` is none of `KINDS`, or has no use on ``device``; False and None are no kind."""
    if kind and kind not in KINDS:
        raise UserError(f"gradient_checkpointing={kind!r} is not known; {nearest(str(kind), KINDS)}")
    if kind == "offload" and device.type == "cpu":
        raise UserError(
            "gradient_checkpointing=offload moves activations from an accelerator to the memory of the host, where "
            "they are on the cpu already: take gradient_checkpointing=block"
        )


@contextmanager
def checkpointed(
    delta: Delta,
    kind: str | bool | None,
    waiting: Callable[[], AbstractContextManager[Any]] = partial(save_on_cpu, pin_memory=True),
) -> Iterator[None]:
    """While inside, the blocks that ``kind`` names keep nothing but their inputs for the backward pass.

    Gradients are those without it, dropout included; where none are recorded nothing changes. Blocks fill no cache
    of keys and values meanwhile. Raises UserError for a model without blocks.

    Args:
        delta: Any adapter of the model; its blocks are those of the anatomy, whatever its family.
        kind: One of `KINDS`; None and False change nothing.
        waiting: Saved-tensor hooks for the inputs of the kind "offload".
    """
    if not kind:
        yield
        return
    model = delta.model
    every = 2 if kind == "selective" else 1
    blocks = [model.get_submodule(path) for paths in delta.anatomy.blocks.values() for path in paths[::every]]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no blocks to compute again: leave gradient_checkpointing out")
    hooks = waiting if kind == "offload" else nullcontext
    plain = [block.__dict__.get("forward") for block in blocks]
    with uncached(model):
        for block, own in zip(blocks, plain, strict=True):
            block.forward = partial(_again, block, own, hooks)
        try:
            yield
        finally:
            for block, own in zip(blocks, plain, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


def _again(block: nn.Module, own: Any, hooks: Any, *args: Any, **kwargs: Any) -> Any:
    run = own or partial(type(block).forward, block)  # looked up now: adapters come and go
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    held = [*args, *kwargs.values()]
    # what asks for gradients is the block's own; masks and positions are all the blocks' and stay where they are
    moving = [index for index, value in enumerate(held) if isinstance(value, Tensor) and value.requires_grad]
    inputs = [held[index] for index in moving]
    for index in moving:
        held[index] = None

    def call(*tensors: Tensor) -> Any:
        values = list(held)
        for index, tensor in zip(moving, tensors, strict=True):
            values[index] = tensor
        return run(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    with hooks():
        return checkpoint(call, *inputs, use_reentrant=False)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """No caches of keys and values, which training does not read and blocks would fill a second time."""
    configs = {
        id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None
    }
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
