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


def words_around(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Names and classes of a module and of those around it, innermost first, without the outermost ("")."""
    owners = [owner for owner in (path, *ancestors(path)) if owner]
    return [word for owner in owners for word in (name_of(owner), type(modules[owner]).__name__)]
