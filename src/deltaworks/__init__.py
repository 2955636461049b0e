"""Every parameter-efficient fine-tuning method behind one call."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaworks.core.anatomy import anatomy
    from deltaworks.core.board import switch
    from deltaworks.core.delta import Delta, attach
    from deltaworks.core.errors import UserError
    from deltaworks.core.mixing import rows
    from deltaworks.core.procedure import Procedure, Run
    from deltaworks.core.registry import Config, configure, methods, registry
    from deltaworks.store.checkpoint import load
    from deltaworks.store.shelf import Shelf
    from deltaworks.train.trainer import DeltaTrainer, DeltaTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "Config", "Delta", "DeltaTrainer", "DeltaTrainerMixin", "Procedure", "Run", "Shelf", "UserError",
    "anatomy", "attach", "configure", "load", "methods", "registry", "rows", "switch",
]  # fmt: skip

# loaded when used: `deltaworks --help` must not wait for torch
_HOMES = {
    "core.anatomy": ("anatomy",),
    "core.board": ("switch",),
    "core.delta": ("Delta", "attach"),
    "core.errors": ("UserError",),
    "core.mixing": ("rows",),
    "core.procedure": ("Procedure", "Run"),
    "core.registry": ("Config", "configure", "methods", "registry"),
    "store.checkpoint": ("load",),
    "store.shelf": ("Shelf",),
    "train.trainer": ("DeltaTrainer", "DeltaTrainerMixin"),
}


def __getattr__(name: str) -> Any:
    """The public names, and configuration classes of the methods by class name: ``dw.LoRA(rank=16)``."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"deltaworks.{home}"), name)
            return value
    if name[:1].isupper():
        for config in import_module("deltaworks.core.registry").registry().values():
            if config.__name__ == name:
                return config
    raise AttributeError(f"module 'deltaworks' has no attribute {name!r}")
