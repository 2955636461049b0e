"""The activation density of feed-forward layers: a smooth count of what is not zero, as a term of the loss."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.board import Tap
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.history import History
from deltaworks.core.lean.remaking import again
from deltaworks.core.places import LINEAR
from deltaworks.core.procedure import Procedure, Run


def smooth_count(activation: Tensor, eps: float) -> Tensor:
    """O^2 / (O^2 + eps) of each entry, in float32."""
    square = activation.float().square()
    return square / (square + eps)


def mean_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``values`` [batch, T, m] over tokens and m, [batch]; ``mask`` [batch, T] is 0 at padding."""
    values = values.mean(-1).reshape(values.shape[0], -1)
    if mask is None or mask.shape != values.shape:  # with virtual tokens among them, all tokens count
        return values.mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


class Density(Procedure):
    """Watches what each second feed-forward matrix reads; ``config`` has ``weight``, ``eps`` and ``threshold``."""

    def __init__(self, delta: Delta, config: Any) -> None:
        super().__init__(delta)
        self.config, self.step, self.steps = config, 0, 1
        places = [p for p in delta.anatomy.places if p.role == "mlp.down" and p.kind in LINEAR and p.part is None]
        if not places:
            raise UserError(f"{config.name} needs feed-forward layers, and {delta.anatomy.model} has no mlp.down")
        trunks = {place.stack: place.path for place in delta.anatomy.places if place.kind == "trunk"}
        self.layers: dict[str, dict[str, Tap]] = {}  # by stack and path
        for place in places:
            tap = delta.watch(place.path, "input", graded=True)
            self.layers.setdefault(place.stack, {})[place.path] = tap
        self.masks = {s: delta.watch(trunks[s], "mask", graded=True) for s in self.layers if s in trunks}
        self.history = History()  # of the density of each stack in percent

    def begin(self, run: Run) -> None:
        self.steps = run.steps

    def read(self) -> dict[str, dict[str, Tensor]]:
        """What the layers read in the forward pass that just ran, by stack and path."""
        return {
            stack: {path: tap.value for path, tap in taps.items() if tap.value is not None}
            for stack, taps in self.layers.items()
        }

    def gate(self, path: str) -> Tensor | float:
        """What the output of a layer is multiplied by."""
        return 1.0

    def exact_count(self, activation: Tensor) -> Tensor:
        """1 for each entry that is not zero."""
        return (activation.abs() > self.config.threshold).float()

    def counted(self, layers: dict[str, Tensor], stack: str, count: Any) -> Tensor:
        """The mean over samples and layers of ``count(O)``."""
        mask = self.masks[stack].value if stack in self.masks else None

        def mean(path: str, read: Tensor) -> Tensor:
            return mean_of(count(self.gate(path) * read), mask).mean()

        means = [again(partial(mean, path), read) for path, read in layers.items()]
        return torch.stack([mean.to(means[0].device) for mean in means]).mean()

    def loss(self, loss: Tensor) -> Tensor:
        if not self.config.weight:
            return loss
        seen = {stack: layers for stack, layers in self.read().items() if layers}
        if not any(read.requires_grad for layers in seen.values() for read in layers.values()):
            raise UserError(
                f"{self.config.name} saw nothing of the feed-forward layers that can learn: tune something in front of "
                "one, and checkpoint gradients with use_reentrant=False"
            )
        for stack, layers in seen.items():
            density = self.counted(layers, stack, lambda read: smooth_count(read, self.config.eps))
            loss = loss + self.config.weight * density.to(loss.device)
        if self.history.due(self.step, self.steps):
            with torch.no_grad():
                shares = {stack: float(self.counted(layers, stack, self.exact_count)) for stack, layers in seen.items()}
            self.history.note(self.step, {stack: 100 * share for stack, share in shares.items()})
        return loss

    def stepped(self) -> None:
        self.step += 1
        for tap in [tap for taps in (*self.layers.values(), self.masks) for tap in taps.values()]:
            tap.value = None

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.history = state["step"], History(state["history"])

    def details(self) -> dict[str, Any]:
        return {f"{self.config.name.replace('-', '_')}_density_percent": self.history.data}
