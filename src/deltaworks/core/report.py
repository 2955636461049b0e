"""Three counts that diverge (trainable, changed, stored) and the rank of the change, by role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


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
    """``changed`` counts entries of the base that the adapter changes, and entries that it adds."""

    method: str
    total: int
    trainable: int
    changed: int
    stored_bytes: int
    rows: list[Row]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        lines = [
            f"{self.method}: trainable {self.trainable:,} of {self.total:,} ({share:.3f} %), "
            f"changed {self.changed:,}, stored {self.stored_bytes:,} bytes",
            f"{'role':<22}{'sites':>7}{'trainable':>14}{'changed':>14}{'rank of the change':>22}",
        ]
        for row in self.rows:
            ranks = f"{min(row.ranks)}..{max(row.ranks)}" if row.ranks else "-"
            lines.append(f"{row.role:<22}{row.sites:>7}{row.trainable:>14,}{row.changed:>14,}{ranks:>22}")
        return "\n".join(lines)


def rank_of(change: Tensor) -> int:
    """Numerical rank of a change [out, in]: singular values above 1e-6 of the largest (float32 products)."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-6 * values.max()).sum()) if values.numel() and float(values.max()) > 0 else 0


def report(delta: Delta, *, ranks: bool = False) -> Report:
    """Count what an adapter trains, changes and stores. Raises nothing; meta devices count shapes alone."""
    rows: dict[str, Row] = {}
    seen: set[int] = set()
    trained = {id(p) for p in delta.parameters()}
    for item in delta.attached:
        row = rows.setdefault(item.place.role, Row(item.place.role))
        row.sites += 1
        fresh = [p for p in item.tuner.parameters() if id(p) in trained and id(p) not in seen]
        seen.update(id(p) for p in fresh)
        trainable = sum(p.numel() for p in fresh)
        row.trainable += trainable
        module = delta.model.get_submodule(item.place.path)
        weight = module._parameters.get("weight")
        if item.tuner.form() == 3 or weight is None or weight.device.type == "meta":
            row.changed += trainable if item.tuner.form() == 3 or weight is None else weight.numel()
            continue
        if item.tuner.gives("weight") or item.tuner.gives("factors") or item.tuner.gives("tensor"):
            change = delta.change(item)
            assert change is not None
            row.changed += int((change != 0).sum())
            if ranks and change.dim() == 2:
                row.ranks.append(rank_of(change))
        else:
            row.changed += trainable
    return Report(
        method=str(delta.config),
        total=sum(p.numel() for p in delta.model.parameters() if id(p) not in trained),
        trainable=sum(row.trainable for row in rows.values()),
        changed=sum(row.changed for row in rows.values()),
        stored_bytes=sum(t.numel() * t.element_size() for t in delta.tensors().values()),
        rows=list(rows.values()),
    )
