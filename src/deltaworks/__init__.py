"""Every parameter-efficient fine-tuning method behind one call."""

from typing import Any

from deltaworks.core.anatomy import anatomy
from deltaworks.core.board import rows, switch
from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, configure, methods, registry
from deltaworks.store.checkpoint import load

__version__ = "0.1.0"
__all__ = [
    "Config", "Delta", "Procedure", "Run", "UserError",
    "anatomy", "attach", "configure", "load", "methods", "registry", "rows", "switch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Configuration classes of the methods by class name: ``dw.LoRA(rank=16)``."""
    for config in registry().values() if name[:1].isupper() else ():
        if config.__name__ == name:
            return config
    raise AttributeError(f"module 'deltaworks' has no attribute {name!r}")
