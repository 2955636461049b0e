"""What the adapters have in common: a narrow two-layer network ``U f(D x + b_D) + b_U``, its width and its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.anatomy import Anatomy, Place
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, option
from deltaworks.core.sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": F.tanh,
    "identity": lambda x: x,
}


@dataclass(kw_only=True)
class AdapterConfig(Config):
    """Where an adapter stands and how wide it is."""

    targets: str = option("attention,mlp", "the residual sub-layers that get an adapter")
    reduction: int = option(16, "the bottleneck is the width d of the model divided by this, rounded down", least=1)
    width: int | None = option(None, "the bottleneck m itself, instead of reduction", least=1)
    activation: str = option("gelu", "the non-linearity f", choices=ACTIVATIONS)

    def bottleneck(self, features: int) -> int:
        """The width m of the bottleneck for ``features`` = d. Raises UserError where nothing would be left."""
        if self.width is None and self.reduction > features:
            raise UserError(
                f"{self.name}: reduction={self.reduction} leaves no bottleneck of {features} features: "
                f"use at most {features}, or give width"
            )
        return self.width or features // self.reduction


class Bottleneck(Tuner):
    """``around`` is the sequential adapter ``z + U f(D z + b_D) + b_U`` on the output z of an operation.

    Shapes: z [..., d], D [m, d], b_D [m], U [d, m], b_U [d]. ``config.init`` is "identity" (U = 0),
    "truncated" (std 1e-3, cut at two standard deviations) or "normal" (std 0.02).
    """

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        features = site.width
        width = config.bottleneck(features)
        if config.init == "identity":
            self.D, self.U = site.kaiming(width, features), site.zeros(features, width)
        elif config.init == "truncated":
            self.D, self.U = (site.truncated(*shape, std=1e-3) for shape in ((width, features), (features, width)))
        else:
            self.D, self.U = (site.normal(*shape, std=0.02) for shape in ((width, features), (features, width)))
        self.b_D, self.b_U = site.zeros(width), site.zeros(features)
        self.activation = ACTIVATIONS[config.activation]

    def change(self, x: Tensor) -> Tensor:
        """``U f(D x + b_D) + b_U`` in the dtype of x. Shapes: [..., d] to [..., d]."""
        inner = self.activation(F.linear(x, self.D.to(x.dtype), self.b_D.to(x.dtype)))
        return F.linear(inner, self.U.to(x.dtype), self.b_U.to(x.dtype))

    def around(self, base: Callable[[Any], Tensor], x: Any) -> Tensor:
        z = base(x)
        return z + self.change(z)


def with_norms(anatomy: Anatomy, places: Iterable[Place]) -> list[Place]:
    """The places and every norm of the model, in model order."""
    chosen = {*places, *anatomy.select("norm", ("norm",))}
    return [place for place in anatomy.places if place in chosen]
