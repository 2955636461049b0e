"""Blocks compiled one by one: one graph for all blocks of a kind, with their adapters in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch has nothing to compile with: Triton on an accelerator, else a C++ compiler."""
    if device.type == "cpu":
        from torch._inductor import config

        if not any(which(name) for name in config.cpp.cxx if name):
            raise UserError("compile=true needs a C++ compiler on a cpu, and none is found: install g++, or set CXX")
    elif find_spec("triton") is None:
        raise UserError(f"compile=true needs triton on {device.type}, and it is not installed: leave compile out")


@contextmanager
def compiled(delta: Delta, backend: Any = "inductor") -> Iterator[None]:
    """While inside, each block of the model runs compiled, in place, for batches of any shape.

    Blocks that are computed again are so as a whole: enter `checkpointed` after this. Raises UserError for a model
    without blocks.
    """
    model = delta.model
    blocks: list[Any] = [model.get_submodule(path) for paths in delta.anatomy.blocks.values() for path in paths]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no blocks to compile: leave compile out")
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
