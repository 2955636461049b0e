"""Positions in a file in the bits that they need: Golomb-Rice codes of the gaps between them.

Sparse methods keep for each value its flat position, ascending. As int32 a position costs as much as its value; of
one entry in a hundred, chosen at random, it has 8.1 bits of information, and takes about 8.2 here. Golomb, 1966,
"Run-length encodings"; Rice and Plaunt, 1971: of a gap g the k lowest bits, and g >> k ones and a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2

import numpy
import torch
from torch import Tensor

from deltaworks.core.errors import UserError

SUFFIX = ":gaps"
"""Ends the names of coded tensors: uint8 [10 + ..] of k, the bytes of an integer, the count and the bits."""
HEAD = numpy.dtype([("low", "u1"), ("size", "u1"), ("count", "<u8")])
LEAST = 64
"""Shorter lists stay as they are."""


def squeezed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with ascending positions (int32 or int64 [n]) coded under names of their own."""
    coded = {key + SUFFIX: encoded(x) for key, x in tensors.items() if is_ascending(x)}
    return {key: x for key, x in tensors.items() if key + SUFFIX not in coded} | coded


def expanded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``squeezed``. Raises UserError for codes that are none."""
    found = {}
    for key, x in tensors.items():
        try:
            found[key.removesuffix(SUFFIX)] = decoded(x) if key.endswith(SUFFIX) else x
        except (ValueError, IndexError, TypeError):
            raise UserError(f"the checkpoint's tensor {key!r} does not hold coded positions") from None
    return found


def is_ascending(x: Tensor) -> bool:
    if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64) or len(x) < LEAST or x.is_meta:
        return False
    return int(x[0]) >= 0 and bool((x[1:] > x[:-1]).all())


def encoded(positions: Tensor) -> Tensor:
    """Ascending positions [n] as uint8 [bytes]."""
    gaps = numpy.diff(positions.numpy(), prepend=-1).astype(numpy.int64) - 1
    low = max(0, round(log2(max(gaps.mean(), 1) * 0.69)))  # the best k for gaps as chance makes them
    bits = numpy.concatenate([_fields(gaps, low), _unary(gaps >> low)])
    head = numpy.array((low, positions.element_size(), len(gaps)), HEAD)
    return torch.from_numpy(numpy.concatenate([numpy.frombuffer(head.tobytes(), "u1"), numpy.packbits(bits)]))


def _fields(numbers: numpy.ndarray, width: int) -> numpy.ndarray:
    """The ``width`` lowest bits of all numbers: first the lowest of each, then the next ones."""
    rows = [((numbers >> bit) & 1).astype(numpy.uint8) for bit in range(width)]
    return numpy.concatenate([numpy.empty(0, numpy.uint8), *rows])


def _unary(numbers: numpy.ndarray) -> numpy.ndarray:
    """Each number as so many zeros and a one."""
    ends = numpy.cumsum(numbers + 1)
    bits = numpy.zeros(ends[-1], numpy.uint8)
    bits[ends - 1] = 1
    return bits


def decoded(code: Tensor) -> Tensor:
    """The inverse of ``encoded``. Raises ValueError, IndexError or TypeError for other bytes."""
    data = code.numpy()
    head = numpy.frombuffer(data[: HEAD.itemsize].tobytes(), HEAD)[0]
    low, count, bits = int(head["low"]), int(head["count"]), numpy.unpackbits(data[HEAD.itemsize :])
    if low > 62 or count * (low + 1) > len(bits):
        raise ValueError
    ends = numpy.flatnonzero(bits[count * low :])
    if len(ends) != count:
        raise ValueError
    gaps = (numpy.diff(ends, prepend=-1) - 1) << low
    for bit in range(low):
        gaps |= bits[bit * count : (bit + 1) * count].astype(numpy.int64) << bit
    positions = numpy.cumsum(gaps + 1) - 1
    return torch.from_numpy(positions.astype(numpy.dtype(f"i{int(head['size'])}")))
