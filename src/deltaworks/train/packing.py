"""Short sequences side by side in one row, instead of padding: positions begin again, attention stays within each.

The batch keeps its examples, and so the loss, which is a mean over their target tokens. Rows are as long as the
longest example and are filled by first fit, the longest first (Johnson, 1974: at most 11/9 of the fewest rows), so that
nothing grows over the padded batch; kernels for sequences of any length (flash attention) get one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.calibration import evaluating
from deltaworks.core.errors import UserError
from deltaworks.train.batching import Encoded, length_of
from deltaworks.train.checkpointing import uncached
from deltaworks.train.losses import IGNORED
from deltaworks.train.tasks import PAD_MULTIPLE, Causal, Task

PROBES = (3, 5)  # tokens of the sequences that a model is tried on


def packed(examples: Sequence[Encoded], pad: int, *, flat: bool = False) -> dict[str, Tensor]:
    """Examples of a causal task as "input_ids", "position_ids" and "labels" [rows, width], without an attention mask.

    ``pad`` fills the ends of rows, as a sequence of its own that predicts nothing. ``flat``: all in one row.
    """
    longest = sum(map(length_of, examples)) if flat else max(map(length_of, examples))
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    rows: list[list[Encoded]] = []
    free: list[int] = []
    for example in sorted(examples, key=length_of, reverse=True):
        length = length_of(example)
        first = next((index for index, room in enumerate(free) if room >= length), len(rows))
        if first == len(rows):
            rows.append([])
            free.append(width)
        rows[first].append(example)
        free[first] -= length
    batch: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
    for row, room in zip(rows, free, strict=True):
        batch["input_ids"].append([token for example in row for token in example["input_ids"]] + [pad] * room)
        lengths = [*map(length_of, row), room]
        batch["position_ids"].append([position for length in lengths for position in range(length)])
        # the first token of a sequence would be predicted by the last of another
        labels = [label for example in row for label in (IGNORED, *example["labels"][1:])]
        batch["labels"].append(labels + [IGNORED] * room)
    return {key: torch.tensor(values) for key, values in batch.items()}


def is_flat(model: Any) -> bool:
    """Whether the model's attention takes one row of sequences of any length."""
    return "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def check_packable(model: nn.Module, task: Task) -> None:
    """Raises UserError for a task whose sequences cannot share a row, and for a model without positions to tell."""
    if not isinstance(task, Causal):
        raise UserError(f"packing puts texts to be continued side by side, and the task is {task.name}: leave it out")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} takes no position_ids, by which sequences in one row are told apart: "
            "leave packing out"
        )


@torch.no_grad()
def check_packed(model: Any, what: str) -> None:
    """Raises UserError where a sequence changes with what stands before it in its row; ``what`` is the adapter.

    Recurrent layers, virtual tokens in front of a row and masks of a model's own let sequences see each other.
    """
    device = next(model.parameters()).device
    alone = [torch.arange(2, 2 + length, device=device)[None] for length in PROBES]
    places = torch.cat([torch.arange(length, device=device) for length in PROBES])[None]
    with evaluating(model), uncached(model):
        expected = torch.cat([model(input_ids=ids).logits for ids in alone], dim=1)
        found = model(input_ids=torch.cat(alone, dim=1), position_ids=places).logits
    # [1, tokens, vocabulary]
    tolerance = max(1e-4, 4 * torch.finfo(found.dtype).eps) * float(expected.abs().max())
    if not float((found - expected).abs().max()) <= tolerance:
        raise UserError(
            f"with {what}, {type(model).__name__} lets sequences in one row see each other: leave packing out"
        )
