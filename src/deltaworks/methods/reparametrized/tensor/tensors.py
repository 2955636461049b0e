"""Tensor trains and rings: matrices as chains of small cores, and how a size is split into modes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from deltaworks.core.sites import Site

PUBLISHED = {
    (768, 5): (5, 8, 12, 8),
    (768, 8): (8, 8, 12, 8),
    (768, 16): (8, 16, 12, 8),
    (768, 32): (4, 8, 12, 8, 8),
    (768, 64): (8, 8, 12, 8, 8),
    (768, 128): (8, 16, 12, 8, 8),
    (1024, 8): (4, 8, 8, 8, 4),
    (1024, 64): (4, 8, 8, 8, 8, 4),
    (4096, 8): (16, 16, 8, 4, 4),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (5120, 8): (8, 8, 10, 8, 8),
    (5120, 64): (5, 8, 8, 16, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4),
    (8192, 64): (4, 16, 16, 16, 8, 4),
}
"""LoRETTA's modes of a matrix with these two sizes, in either order."""


def split(size: int, count: int) -> tuple[int, ...]:
    """``count`` factors of ``size``, as equal as a greedy choice makes them, ascending."""
    primes, rest, divisor = [], size, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    factors = [1] * count
    for prime in sorted([*primes, rest], reverse=True):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors))


def padded_split(size: int, count: int) -> tuple[int, ...]:
    """``split`` of the first number from ``size`` on whose factors stay below twice the ``count``-th root."""
    while max(factors := split(size, count)) > 2 * size ** (1 / count):
        size += 1
    return factors


def train_modes(inner: int, outer: int) -> tuple[int, ...]:
    """Modes of a matrix [inner, outer]: the published ones, else factors near 8 with the largest in the middle."""
    size = inner * outer
    published = PUBLISHED.get((max(inner, outer), min(inner, outer)))
    factors = split(size, max(2, round(math.log(size, 8))))
    return published or factors[::2] + factors[1::2][::-1]


def train(site: Site, inner: int, outer: int, rank: int, *, zero: bool) -> nn.ParameterList:
    """Cores [r_{i-1}, k_i, r_i], r_0 = r_D = 1, of a matrix [inner, outer] of standard deviation (inner + outer)^-1/2.

    With ``zero`` the last core, and so the matrix, is zero.
    """
    modes = train_modes(inner, outer)
    ranks, share = [1, *[rank] * (len(modes) - 1), 1], (inner + outer) ** (-0.5 / len(modes))
    shapes = list(zip(ranks, modes, ranks[1:], strict=False))
    cores = [site.normal(*shape, std=share / shape[2] ** 0.5) for shape in (shapes[:-1] if zero else shapes)]
    return nn.ParameterList(cores + ([site.zeros(*shapes[-1])] if zero else []))


def train_entries(cores: Iterable[Tensor]) -> Tensor:
    """G_1[:, i_1, :] ... G_D[:, i_D, :] for all indices, row-major: cores [r, k, r'] to [k_1 ... k_D]."""
    first, *rest = cores
    found = first
    for core in rest:
        found = (found.flatten(0, -2) @ core.flatten(1)).unflatten(-1, core.shape[1:])
    return found.flatten()


def ring_open(cores: Iterable[Tensor]) -> Tensor:
    """G_1[i_1] ... G_K[i_K] for all indices, row-major: cores [k, Q, Q] to [k_1 ... k_K, Q, Q]."""
    first, *rest = cores
    found = first
    for core in rest:
        found = torch.einsum("iab,kbc->ikac", found, core).flatten(0, 1)
    return found


def ring_matrix(cores: Iterable[Tensor]) -> Tensor:
    """trace(A_1[i_1, j_1] ... A_K[i_K, j_K]): cores [I_k, I_k, R, R] to [I_1 ... I_K, I_1 ... I_K]."""
    *rest, last = cores
    found = rest[0]
    for core in rest[1:]:
        found = torch.einsum("ijar,klrs->ikjlas", found, core).flatten(2, 3).flatten(0, 1)
    return torch.einsum("ijar,klra->ikjl", found, last).flatten(2, 3).flatten(0, 1)


def ring_product(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """``ring_matrix(cores) @ x`` for x [..., I_1 ... I_K], core by core: the matrix is never formed."""
    first, *middle, last = cores
    z = x.unflatten(-1, (first.shape[1], -1))  # [..., j, what is left]
    z = torch.einsum("ijar,...jm->...arim", first, z)  # done so far, what is left
    for core in middle:
        z = torch.einsum("ijrs,...ardjm->...asdim", core, z.unflatten(-1, (core.shape[1], -1))).flatten(-3, -2)
    return torch.einsum("ijra,...ardj->...di", last, z).flatten(-2)
