"""The layers of a model as an adapter's tuners stand in them: some of them may rest, or act weaker, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.sites import stable_hash
from deltaworks.core.weights import low_rank

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


def layers(delta: Delta) -> dict[str, list[Tuner]]:
    """The tuners in each block of the model, by "3" or "decoder.3", without what is trained ``also``."""
    found: dict[str, list[Tuner]] = {}
    for item in delta.attached:
        if item.place.block is not None and item.member < len(delta.members):
            found.setdefault(f"{item.place.stack}.{item.place.block}".lstrip("."), []).append(item.tuner)
    return found


def rest(delta: Delta, tuners: Sequence[Tuner]) -> None:
    """Let exactly these tuners rest: they act, but what only they hold gets no gradient and keeps none."""
    for parameter in delta.resting:
        parameter.requires_grad_(True)
    asleep = {id(tuner) for tuner in tuners}
    awake = {id(p) for tuner in delta.tuners() if id(tuner) not in asleep for p in tuner.parameters()}
    once = {id(p): p for tuner in tuners for p in tuner.parameters() if p.requires_grad and id(p) not in awake}
    delta.resting = list(once.values())
    for parameter in delta.resting:
        parameter.requires_grad_(False)
        parameter.grad = None  # a zero would still move it, by momentum and decay


def drawn(weights: Tensor, count: int, name: str) -> list[int]:
    """``count`` different positions in ascending order, likely as their ``weights`` say; ``name`` is the seed."""
    generator = torch.Generator().manual_seed(stable_hash(name))
    return torch.multinomial(weights, count, generator=generator).sort().values.tolist()


@contextmanager
def damped(tuners: Sequence[Tuner], strength: float) -> Iterator[None]:
    """The tuners with their change of the output (or of the weight) multiplied by ``strength``."""
    before = [tuner.strength for tuner in tuners]
    try:
        for tuner in tuners:
            tuner.strength = strength
        yield
    finally:
        for tuner, old in zip(tuners, before, strict=True):
            tuner.strength = old


@contextmanager
def observed(tuners: Sequence[Tuner], see: Callable[[Tuner, Tensor, Tensor], None]) -> Iterator[None]:
    """``see(tuner, before, change)`` of each output that these tuners change: of linear layers and of sub-layers."""
    try:
        for tuner in tuners:
            tuner.observer = see
        yield
    finally:
        for tuner in tuners:
            tuner.observer = None


def at_strength(tuner: Any) -> Any:
    """The tuner, or where it is damped or observed, what acts instead."""
    if tuner.observer is not None:
        return Observed(tuner)
    return tuner if tuner.strength == 1.0 else Damped(tuner)


class Damped:
    """A tuner of which only a part acts: between what it finds (0) and what it makes of it (1)."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tuner, name)

    def _between(self, before: Tensor, after: Tensor) -> Tensor:
        return before + self.tuner.strength * (after - before)

    def factors(self) -> Factors:
        return self._weaker(self.tuner.factors())

    def selecting(self) -> Factors | None:
        chosen = self.tuner.selecting()
        return None if chosen is None else self._weaker(chosen)

    def _weaker(self, factors: Factors) -> Factors:
        return factors._replace(scale=factors.scale * self.tuner.strength)

    def weight(self, weight: Tensor) -> Tensor:
        return self._between(weight, self.tuner.weight(weight))

    def bias(self, bias: Tensor | None) -> Tensor | None:
        new = self.tuner.bias(bias)
        return new if new is None else self._between(torch.zeros_like(new) if bias is None else bias, new)

    def tensor(self, name: str, base: Tensor) -> Tensor:
        return self._between(base, self.tuner.tensor(name, base))

    def around(self, base: Any, x: Any) -> Tensor:
        return self._between(base(x), self.tuner.around(base, x))


class Observed:
    """A tuner whose change of the output is shown to its observer: low-rank products, and what stands around."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tuner, name)

    def gives(self, form: str) -> bool:
        return form == "around" or self.tuner.gives(form)

    def around(self, base: Any, x: Any) -> Tensor:
        tuner, before = self.tuner, []

        def shown(new: Any) -> Tensor:
            before.append(base(new))
            return before[-1]

        if tuner.gives("around"):
            after = tuner.around(shown, x)
            change = after.detach() - before[-1].detach()
        else:
            y, dropped = shown(x), F.dropout(x, tuner.dropout, tuner.training)
            change = low_rank(None, tuner, dropped).to(y.dtype)
            after = y + change
        assert tuner.observer is not None
        tuner.observer(tuner, before[-1].detach(), change.detach())
        return after
