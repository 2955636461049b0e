"""The order of the data: a seed decides it, and so it is the same for every method that is compared."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from deltaworks.core.errors import UserError

Encoded = dict[str, Any]


def batches(
    encoded: Sequence[Encoded],
    batch_size: int,
    seed: int,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    group_by_length: bool = False,
) -> Iterator[list[Encoded]]:
    """Lists of examples in an order that the seed alone decides, for `Task.collate`.

    Every epoch is a fresh shuffle with a last batch that may be smaller; `steps` counts batches and goes
    through as many epochs as it takes. `group_by_length` puts examples of like length into one batch.

    Raises:
        UserError: No rows, a batch size below 1, or not exactly one of `epochs` and `steps`.
    """
    if not encoded:
        raise UserError("there is nothing to train on: the training split has no rows")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not possible; give at least 1")
    if (epochs is None) == (steps is None):
        raise UserError("say either epochs or steps, not both and not neither")
    per_epoch = -(-len(encoded) // batch_size)
    return _batches(
        encoded, batch_size, seed, steps if steps is not None else per_epoch * (epochs or 0), group_by_length
    )


def _batches(
    encoded: Sequence[Encoded], batch_size: int, seed: int, steps: int, group_by_length: bool
) -> Iterator[list[Encoded]]:
    generator = random.Random(seed)
    done = 0
    while done < steps:
        order = generator.sample(range(len(encoded)), len(encoded))
        if group_by_length:
            pool = 32 * batch_size  # examples sorted together: enough for like lengths, still random
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = [index for part in pools for index in sorted(part, key=lambda i: -length_of(encoded[i]))]
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if group_by_length:
            generator.shuffle(chunks)
        for chunk in chunks[: steps - done]:
            yield [encoded[index] for index in chunk]
        done += len(chunks)


def length_of(example: Encoded) -> int:
    """Tokens of an encoded example, 0 for pictures."""
    return len(example.get("input_ids", ()))
