"""What a method does over time: budgets, masks, extra losses. One object for a hand loop and for the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


@dataclass
class Run:
    """What a procedure may know of the training it takes part in.

    ``steps`` is the number of optimizer steps; ``batches`` yields batches of size ``batch_size`` and can be
    iterated again; ``loss`` maps (model, batch) to the scalar training loss; ``one_by_one`` yields the training
    examples as batches of one, for methods that need per-example gradients.
    """

    steps: int
    batches: Iterable[Any] = field(default_factory=list)
    loss: Callable[[Any, Any], Tensor] | None = None
    one_by_one: Iterable[Any] | None = None


class Procedure:
    """The clock of a method. The default does nothing; methods override the hooks they need.

    A hand-written loop calls them like this::

        procedure.begin(Run(steps=100, batches=loader, loss=loss_of))
        optimizer = torch.optim.AdamW(delta.parameter_groups(rate))
        procedure.optimizing(optimizer)
        for batch in loader:
            loss = procedure.loss(loss_of(model, batch))
            loss.backward()
            procedure.gradients()
            optimizer.step()
            procedure.stepped()
            optimizer.zero_grad()
        procedure.end()
    """

    def __init__(self, delta: Delta) -> None:
        self.delta = delta

    def begin(self, run: Run) -> None:
        """Before the optimizer is made: calibration; tensors may still change their shapes."""

    def optimizing(self, optimizer: Optimizer) -> None:
        """When the optimizer is made: for methods that start its state again in the middle."""

    def loss(self, loss: Tensor) -> Tensor:
        """The training loss with the method's own terms."""
        return loss

    def gradients(self) -> None:
        """After the backward pass (gradients unscaled), before the optimizer's step."""

    def stepped(self) -> None:
        """After the optimizer's step, before gradients are cleared."""

    def end(self) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any]:
        """What resuming in the middle needs: tensors, numbers, lists and strings."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""

    def details(self) -> dict[str, Any]:
        """What the run's record tells of it, and the report draws, by names such as ``adalora_rank``.

        Each value is a number; or numbers by the names of layers, ``{"blocks.0": 3.0, ...}``; or such over time,
        ``{"steps": [10, 20], "values": {"blocks.0": [8, 4], ...}}``, as ``History.data`` has them. A name begins with
        that of the method and ends with what is counted or with the unit (``_percent``, ``_bytes``, ``_seconds``).
        """
        return {}


class Procedures(Procedure):
    """Several procedures, one after the other, for composed methods."""

    def __init__(self, delta: Delta, members: list[Procedure]) -> None:
        super().__init__(delta)
        self.members = members

    def begin(self, run: Run) -> None:
        for member in self.members:
            member.begin(run)

    def optimizing(self, optimizer: Optimizer) -> None:
        for member in self.members:
            member.optimizing(optimizer)

    def loss(self, loss: Tensor) -> Tensor:
        for member in self.members:
            loss = member.loss(loss)
        return loss

    def gradients(self) -> None:
        for member in self.members:
            member.gradients()

    def stepped(self) -> None:
        for member in self.members:
            member.stepped()

    def end(self) -> None:
        for member in self.members:
            member.end()

    def state(self) -> dict[str, Any]:
        return {str(index): member.state() for index, member in enumerate(self.members)}

    def resume(self, state: dict[str, Any]) -> None:
        for index, member in enumerate(self.members):
            member.resume(state.get(str(index), {}))

    def details(self) -> dict[str, Any]:
        return {key: value for member in self.members for key, value in member.details().items()}
