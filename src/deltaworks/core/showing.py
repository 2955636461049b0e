"""A module whose weight is read from outside, rather than called, as its tuners make it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deltaworks.core.weights import base_tensors, effective
from deltaworks.core.wrapping import acting


@contextmanager
def shown(module: Any) -> Iterator[None]:
    """Let ``module.weight`` and its other parameters be the effective ones for a while, gradients included.

    For losses that multiply by the weight of the output layer themselves. Only changes of the weight (forms 1 and 2)
    can be seen so, and dropout inside them does not act.
    """
    tuners = acting(module)
    module._effective = effective(tuners, base_tensors(module)) if tuners else None
    try:
        yield
    finally:
        module._effective = None
