"""Positions in files: exact, close to what information asks for, and safe from bytes that are none."""

from math import log2

import pytest
import torch

from deltaworks.core.errors import UserError
from deltaworks.store.positions import SUFFIX, expanded, squeezed


def some(density: float, size: int = 1_000_000) -> torch.Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(0)) < density).nonzero().flatten()


@pytest.mark.parametrize("density", [0.7, 0.3, 0.02, 0.003, 0.0002])
def test_random_positions_take_little_more_than_their_information(density: float) -> None:
    index = some(density).to(torch.int32)
    coded = squeezed({"index": index})[f"index{SUFFIX}"]
    entropy = -(density * log2(density) + (1 - density) * log2(1 - density)) / density
    bits = 8 * coded.numel() / len(index)
    assert entropy - 0.6 < bits < 1.07 * entropy + 0.2 + 100 / len(index)
    back = expanded({f"index{SUFFIX}": coded})["index"]
    assert back.dtype == torch.int32
    assert torch.equal(back, index)


@pytest.mark.parametrize(
    "index",
    [
        torch.arange(64),
        torch.arange(64) * 2**40,
        torch.cat([torch.arange(99), torch.tensor([2**62])]),
        torch.arange(5, 1000, 7, dtype=torch.int32),
    ],
)
def test_any_ascending_positions_come_back(index: torch.Tensor) -> None:
    back = expanded(squeezed({"a.index": index}))["a.index"]
    assert back.dtype == index.dtype
    assert torch.equal(back, index)


def test_other_tensors_stay_as_they_are() -> None:
    tensors = {
        "values": torch.rand(100),
        "unordered": torch.arange(100).flip(0),
        "negative": torch.arange(-1, 99),
        "short": torch.arange(9),
        "bytes": torch.arange(100, dtype=torch.uint8),
        "none": torch.empty(0, dtype=torch.int32),
    }
    kept = squeezed(tensors)
    assert kept.keys() == tensors.keys()
    assert all(kept[key] is tensors[key] for key in tensors)


@pytest.mark.parametrize(
    "code",
    [
        torch.zeros(0, dtype=torch.uint8),
        torch.full((40,), 255, dtype=torch.uint8),
        torch.rand(40),
        squeezed({"x": torch.arange(0, 999, 3)})[f"x{SUFFIX}"][:-5],
        torch.cat([torch.tensor([3, 3]), torch.zeros(40)]).to(torch.uint8),
    ],
)
def test_bytes_that_are_no_positions_are_refused(code: torch.Tensor) -> None:
    with pytest.raises(UserError, match="does not hold coded positions"):
        expanded({f"a{SUFFIX}": code})
