"""Models without their weights, of families that no task here trains: what anatomy is shown of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.store.files import read_json


def skeleton(folder: Path) -> nn.Module | None:
    """The model that a ``config.json`` of transformers or diffusers speaks of, on the meta device; None without one.

    Raises UserError for a class that the installed library has not, and for a pipeline, which is several models.
    """
    if (folder / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise UserError(f"{str(folder)!r} is a pipeline of several models: name one of {', '.join(parts)} in it")
    if not (folder / "config.json").is_file():
        return None
    data = read_json(folder / "config.json")
    if not isinstance(data, dict):
        return None
    with torch.device("meta"):
        if "_class_name" in data:
            built: nn.Module = _class("diffusers", data["_class_name"], folder).from_config(data)
            return built
        if names := data.get("architectures"):
            kind = _class("transformers", names[0], folder)
            made: nn.Module = kind._from_config(kind.config_class.from_pretrained(folder))
            return made
    return None


def _class(library: str, name: Any, folder: Path) -> Any:
    from importlib import import_module

    found = getattr(import_module(library), str(name), None)
    if found is None:
        raise UserError(f"{str(folder)!r} is a {name}, which the installed {library} has not: update it")
    return found
