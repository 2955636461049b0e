"""Dotted paths of modules: who contains whom, from the names alone. "" is the model or block itself."""

from collections.abc import Iterator, Mapping

from torch import nn


def join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def name_of(path: str) -> str:
    return path.rpartition(".")[2]


def contains(outer: str, path: str) -> bool:
    """Whether `path` is the module `outer` or lies inside it."""
    return not outer or path == outer or path.startswith(outer + ".")


def ancestors(path: str) -> Iterator[str]:
    """The modules around a path, innermost first, down to the model itself ("")."""
    while path:
        path = parent_of(path)
        yield path


def around(within: Mapping[str, nn.Module], path: str) -> tuple[list[str], list[str]]:
    """Names and classes of the modules around a path inside a block, without the block itself."""
    owners = [owner for owner in ancestors(path) if owner]
    return [name_of(owner) for owner in owners], [type(within[owner]).__name__ for owner in owners]
