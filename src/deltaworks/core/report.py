"""Three counts that diverge (trainable, changed, stored) and the rank of the change, by role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaworks.core.sharding import size_of
from deltaworks.core.weights import base_tensors, matrix_of, to_matrix

if TYPE_CHECKING:
    from deltaworks.core.building import Attached
    from deltaworks.core.delta import Delta

ROUNDINGS = 16
"""Of float32, in which adapters are held: what DoRA, PiSSA or HRA make of a weight before they learn misses it by up
to 7 of its largest entry, as measured on layers of 64 to 3072 features."""


@dataclass
class Row:
    """Counts of one role. ``ranks`` holds the rank of the change of each weight, where it was asked for."""

    role: str
    sites: int = 0
    trainable: int = 0
    changed: int = 0
    ranks: list[int] = field(default_factory=list)


@dataclass
class Report:
    """``changed`` counts entries of the base that the adapter changes now, and entries that it adds.

    A weight that is the base's but for the rounding of float32 is unchanged. ``stored_bytes`` are those of its tensors;
    a file holds the positions of sparse methods in fewer.
    Printed, it is a table of at most 80 columns for models whose roles have short names.
    """

    method: str
    base: str
    total: int
    trainable: int
    changed: int
    stored_bytes: int
    rows: list[Row]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        head = [
            f"{self.method} on {self.base}",
            f"trainable  {self.trainable:,} of {self.total:,} ({share:.3g} %)",
            f"changed    {self.changed:,}",
            f"stored     {self.stored_bytes:,} bytes",
        ]
        titles = ("role", "sites", "trainable", "changed", "rank of the change")
        cells = [
            (row.role, f"{row.sites:,}", f"{row.trainable:,}", f"{row.changed:,}", _span(row.ranks))
            for row in self.rows
        ]
        columns = list(zip(titles, *cells, strict=True))
        if not any(columns[-1][1:]):
            columns.pop()
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in zip(*columns, strict=True)
        ]
        return "\n".join([*head, "", *lines])


def _span(ranks: list[int]) -> str:
    """``16``, ``3 to 16``, or nothing."""
    return " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else ""


def rank_of(change: Tensor) -> int:
    """Numerical rank of a change [out, in]: singular values above 1e-6 of the largest (float32 products)."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-6 * values.max()).sum()) if values.numel() and float(values.max()) > 0 else 0


def _change(delta: Delta, item: Attached) -> Tensor:
    """The change at one place, zero where it is rounding alone."""
    change = delta.change(item)
    assert change is not None
    if not bool(change.any()):
        return change
    place = item.place
    held = base_tensors(delta.model.get_submodule(place.path))[place.parameter]
    weight = to_matrix(place.kind, held) if item.tuner.gives("tensor") else matrix_of(place, held)
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps * weight.abs().max()
    return torch.zeros_like(change) if bool(change.abs().max() <= rounding) else change


def report(delta: Delta, *, ranks: bool = False) -> Report:
    """Count what an adapter trains, changes and stores. Raises nothing; meta devices count shapes alone."""
    rows: dict[str, Row] = {}
    seen: set[int] = set()
    trained = {id(p) for p in delta.parameters()}
    counted: set[tuple[int, int]] = set()  # whole tensors, by member and identity: tied ones change once
    for item in delta.attached:
        row = rows.setdefault(item.place.role, Row(item.place.role))
        row.sites += 1
        fresh = [p for p in item.tuner.parameters() if id(p) in trained and id(p) not in seen]
        seen.update(id(p) for p in fresh)
        trainable = sum(p.numel() for p in fresh)
        row.trainable += trainable
        module = delta.model.get_submodule(item.place.path)
        weight = module._parameters.get(item.place.parameter)
        if item.tuner.form() == 3 or weight is None:
            row.changed += trainable
            continue
        if item.tuner.gives("tensor") and (item.member, id(weight)) in counted:
            continue
        counted.add((item.member, id(weight)))
        if weight.device.type == "meta":
            row.changed += matrix_of(item.place, weight).numel()
            continue
        if item.tuner.gives("weight") or item.tuner.gives("factors") or item.tuner.gives("tensor"):
            change = _change(delta, item)
            row.changed += int((change != 0).sum())
            if ranks and change.dim() == 2:
                row.ranks.append(rank_of(change))
        else:
            row.changed += trainable
    return Report(
        method=str(delta.config),
        base=type(delta.model).__name__,
        total=sum(size_of(p) for p in delta.model.parameters() if id(p) not in trained),
        trainable=sum(row.trainable for row in rows.values()),
        changed=sum(row.changed for row in rows.values()),
        stored_bytes=sum(t.numel() * t.element_size() for t in delta.tensors().values()),
        rows=list(rows.values()),
    )
