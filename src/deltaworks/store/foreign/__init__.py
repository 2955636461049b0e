"""Formats of other libraries, read and written; each is one module of this folder, named in ``FORMATS``.

A format's module has those of four functions that it can do, and nothing else here knows about it:

``recognises(folder) -> bool``
    Whether a path holds a checkpoint of this format. Looks at names of files only.
``read(model, folder, name) -> Delta``
    Attaches what the checkpoint holds. Raises UserError, and leaves the model as it was, for what does not fit.
``write(delta, folder, rank=None) -> None``
    Writes the adapter. Exact where the format can express it; ``rank`` allows a truncation to factors of that rank.
``translated(model, spec, seed) -> (Config, also, seed, tied)``
    A configuration of that library as ours; ``understands(spec) -> bool`` says whether it is one.

The pieces that formats share: ``lowering.lowered`` (any adapter as factors A and B by path, with the error of what
was cut off), ``targets`` (which modules a peft configuration names, and names for paths), ``tensors`` (safetensors
files, and the errors that list what is extra, missing or misshapen). What a conversion loses is a ``ConversionWarning``
that says what and how much; what it cannot express is a UserError.

The format of huggingface/peft is ``peft``; its methods are the rows of one table, ``peft_types.TYPES``: the fields of
the configuration beside our options, and the names of the tensors beside ours. Files of ``diffusers`` hold the same
tensors and configurations, for the parts of a pipeline.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError, nearest

FORMATS = ("peft", "diffusers", "vllm", "kohya")
"""The modules of this folder that are formats."""


class ConversionWarning(UserWarning):
    """What an adapter loses on its way to or from another format, and how much."""


def lost(what: str) -> None:
    """Say what a conversion loses."""
    warnings.warn(what, ConversionWarning, stacklevel=3)


def writers() -> list[str]:
    """The formats that can be written."""
    return [name for name in FORMATS if hasattr(_module(name), "write")]


def writer(name: str) -> Any:
    """The module of a format that can be written. Raises UserError where there is none."""
    if name not in writers():
        raise UserError(f"{name!r} is not a format to write: {nearest(name, [*writers(), 'deltaworks'])}")
    return _module(name)


def recognised(folder: Path) -> Any | None:
    """The module of the format that ``folder`` is in, or None.

    Raises UserError where its folders are adapters, as peft writes those that have names.
    """
    readers = [module for module in map(_module, FORMATS) if hasattr(module, "recognises")]
    found = next((module for module in readers if module.recognises(folder)), None)
    if found is None and folder.is_dir():
        inner = sorted(own.name for own in folder.iterdir() if own.is_dir() and any(m.recognises(own) for m in readers))
        if inner:
            raise UserError(f"{str(folder)!r} holds the adapters {', '.join(inner)} in folders of their own: give one")
    return found


def translator(spec: Any) -> Any:
    """The module that understands a configuration of another library. Raises UserError where none does."""
    for module in map(_module, FORMATS):
        if hasattr(module, "understands") and module.understands(spec):
            return module
    raise UserError(f"a method is a name such as 'lora[rank=16]' or a configuration, not {str(spec)[:60]!r}")


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")
