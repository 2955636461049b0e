"""Tensors of foreign files: read without unpickling, compared with what is expected, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.store.files import write_atomically

SHOWN = 5
"""How many names a message lists of each kind."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {path.name} in {str(path.parent)!r}") from None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error})") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that the head of a safetensors file holds beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at once."""
    from safetensors.torch import save

    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_atomically(path, save(whole, metadata=dict(metadata)))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(data, indent=2, sort_keys=True))


def check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int | None]]) -> None:
    """Compare the tensors of a file with the expected shapes (None: any size).

    Raises UserError that lists what is missing, what has no place and what is of another shape or no real number.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{key} {list(found[key].shape)}, not {['any' if size is None else size for size in shape]}"
        for key, shape in sorted(expected.items())
        if key in found and not _fits(found[key].shape, shape)
    ]
    unreal = [
        f"{key} ({str(found[key].dtype).removeprefix('torch.')})"
        for key in sorted(expected.keys() & found.keys())
        if not found[key].is_floating_point()
    ]
    parts = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("without a place", extra),
            ("of another shape", misshapen),
            ("not of real floating-point numbers", unreal),
        )
        if names
    ]
    if parts:
        raise UserError(f"{str(path)!r} does not fit this model; {'; '.join(parts)}")


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of float8, which nothing computes with, as float32."""
    small = {key for key, value in tensors.items() if value.is_floating_point() and value.itemsize == 1}
    return {key: value.float() if key in small else value for key, value in tensors.items()}


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
