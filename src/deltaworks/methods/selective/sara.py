"""SaRA: train the smallest weights, which hardly matter to the base, under a nuclear norm, and half-way fewer of them.

Paper: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, Hu et al., 2024,
arXiv:2409.06633 (ICLR 2025).
Formula: M = |P0| < theta for every parameter P0 (strictly, in float32); P = P0 + v on M with v [k] trained from 0.
Every step adds lambda ||P * M||_* of one matrix at random, by its current values. After T steps the mask narrows to
M' = M and |P| < theta: the other entries stay as they are then, and the optimizer's state starts again from zero.
Count: the number of entries below theta, of all tensors.
Departure: the published code writes |w| where it means w before the first step and at the turn, its rank loss never
reaches the trained values in the memory-saving path, and a step is lost at the turn; none is copied; no value decays.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.anatomy import backbone
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site, stable_hash
from deltaworks.methods.selective.entries import Choosing, Entries, EntriesTuner, below, narrowed


def default_rate(threshold: float) -> float:
    """The learning rate that the published code takes for a threshold."""
    return 1e-3 * math.exp(-350 * threshold)


class SmallEntries(Entries):
    """Entries whose positions follow from the base; ``mark`` is a checksum of them."""

    def __init__(self, parameter: Tensor, threshold: float) -> None:
        index = below(parameter.detach(), threshold)
        super().__init__(index, torch.zeros(len(index), device=index.device))
        self.register_buffer("index", narrowed(index, parameter.numel()), persistent=False)
        self.register_buffer("mark", ((index + 1) * 2654435761).sum())  # int64, wraps around


class SaRATuner(EntriesTuner):
    """The entries of one module that are below the threshold."""

    def __init__(self, site: Site, config: "SaRA") -> None:
        super().__init__(site)
        base = site.tensors
        for name, (key, _) in self.own.items():
            if key not in self.entries:
                entries = SmallEntries(base[name], config.threshold)
                if len(entries.index):
                    self.entries[key] = entries
        self.choose()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.fill(tensors, self.stored().keys())

    def fill(self, tensors: Mapping[str, Tensor], expected: Collection[str]) -> None:
        own = self.stored()
        for name in tensors.keys() & own.keys():
            if name.endswith(".mark") and not torch.equal(own[name].cpu(), tensors[name].cpu()):
                raise UserError(f"{name!r} tells of other entries than those that are below the threshold in this base")
        super().fill(tensors, expected)


class SaRAProcedure(Choosing):
    """The nuclear norm of one matrix a step, and the narrowing of the mask."""

    step, turn = 0, 0

    def __init__(self, delta: Delta, config: "SaRA") -> None:
        super().__init__(delta, config)
        own: dict[int, Any] = self.tuners()[0].entries
        self.pairs = {f"{i.key}.{name}": (key, own[key]) for key, (i, name) in self.owners().items() if key in own}
        shapes = {name: self.values(key).shape for name, (key, _) in self.pairs.items()}
        self.eligible = [name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > config.above]
        self.live: dict[str, Tensor] = {}  # which entries are in M', by the names of ``pairs``
        self.held: dict[str, Tensor] = {}  # the values of all of them when the mask narrowed

    def begin(self, run: Run) -> None:
        self.turn = max(1, round(self.config.reselect * run.steps)) if self.config.reselect < 1 else 0

    def loss(self, loss: Tensor) -> Tensor:
        if not self.eligible or not self.config.nuclear:
            return super().loss(loss)
        draw = torch.Generator().manual_seed(stable_hash(f"{self.delta.seed}/{self.step}"))
        name = self.eligible[int(torch.randint(len(self.eligible), (), generator=draw))]
        key, entries = self.pairs[name]
        return super().loss(loss) + self.config.nuclear * nuclear_norm(self.values(key), entries).to(loss.device)

    @torch.no_grad()
    def stepped(self) -> None:
        self.step += 1
        if self.step == self.turn:
            for name, (key, entries) in self.pairs.items():
                self.live[name] = entries.current(self.values(key)).abs() < self.config.threshold
                self.held[name] = entries.values.detach().clone()
                self.restart([entries.values])
        for name, live in self.live.items():
            values = self.pairs[name][1].values
            values.copy_(torch.where(live, values, self.held[name]))

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "live": self.live}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.live = state["step"], {}
        for name, live in state["live"].items():
            values = self.pairs[name][1].values.detach()
            self.live[name], self.held[name] = live.to(values.device), values.clone()

    def details(self) -> dict[str, Any]:
        return super().details() | {"sara_live_entries": {name: int(live.sum()) for name, live in self.live.items()}}


def nuclear_norm(parameter: Tensor, entries: Entries) -> Tensor:
    """||P * M||_*: the sum of the singular values of a matrix's chosen entries as they are now, the others 0."""
    masked = entries.values.new_zeros(parameter.numel()).index_add(0, entries.index, entries.current(parameter))
    return torch.linalg.matrix_norm(masked.view(parameter.shape), ord="nuc")


@method(
    "sara",
    family="selective",
    paper="Hu et al., 2024, arXiv:2409.06633",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=SaRATuner,
    learning_rate=default_rate(2e-3),
    tried=(default_rate(2e-3), 1e-3, 3e-3),
    limits={"sharded": "its nuclear norm is that of whole matrices of the base"},
    small={"threshold": 0.05, "above": 8},
)
class SaRA(Config):
    targets: str = option("all", "whose entries are trained, never the output head's; the paper: the whole UNet")
    threshold: float = option(2e-3, "theta: entries below it are trained (the paper: 2e-4 to 1e-1)", least=0)
    nuclear: float = option(5e-3, "lambda, the weight of the nuclear norm (the published code: 5e-4 or 0)", least=0)
    above: int = option(64, "matrices with both sides longer than this get the nuclear norm", least=0)
    reselect: float = option(0.5, "when the mask narrows, as a share of the steps; 1: never", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self)["learning_rate"] = type(self).learning_rate * default_rate(self.threshold) / default_rate(2e-3)

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def procedure(self, delta: Delta) -> Procedure:
        return SaRAProcedure(delta, self)
