"""Models of families that no task here trains, by the class that their folder names: bare, or with their weights."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.store.files import read_json
from deltaworks.train.models import explained


def skeleton(folder: Path) -> nn.Module | None:
    """The model that a ``config.json`` of transformers or diffusers speaks of, on the meta device; None without one.

    Raises UserError for a class that the installed library has not, and for a pipeline, which is several models.
    """
    kind = _kind(folder)
    if kind is None:
        return None
    with torch.device("meta"):
        if hasattr(kind, "config_class") and hasattr(kind, "_from_config"):
            made: nn.Module = kind._from_config(kind.config_class.from_pretrained(folder))
            return made
        built: nn.Module = kind.from_config(kind.load_config(folder))
        return built


def named(folder: Path) -> nn.Module | None:
    """The same model with its weights, in their dtype. Raises UserError where these are not readable."""
    kind = _kind(folder)
    if kind is None:
        return None
    options = {"dtype": "auto"} if hasattr(kind, "_from_config") else {"torch_dtype": _dtype(folder)}
    model: nn.Module = explained(repr(str(folder)), kind.from_pretrained, str(folder), local_files_only=True, **options)
    return model.eval()


def _dtype(folder: Path) -> torch.dtype | None:
    """That of the first tensor in a folder's files, None where they hold none: diffusers would make it float32."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                return file.get_tensor(name).dtype
    return None


def _kind(folder: Path) -> Any:
    """The class of a folder's model, None where no configuration names one."""
    if (folder / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise UserError(f"{str(folder)!r} is a pipeline of several models: name one of {', '.join(parts)} in it")
    data = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(data, dict):
        return None
    names = data.get("architectures") or [None]
    library, name = ("diffusers", data["_class_name"]) if "_class_name" in data else ("transformers", names[0])
    if name is None:
        return None
    found = getattr(import_module(library), str(name), None)
    if found is None:
        raise UserError(f"{str(folder)!r} is a {name}, which the installed {library} has not: update it")
    return found
