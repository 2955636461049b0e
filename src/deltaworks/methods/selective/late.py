"""Low-rank modules that a weight gets only once it was found to need one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.sites import Site, stable_hash


class LateModule(Tuner):
    """D [r, in] and U [out, r], which are there once the weight was found to need them."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        (self.out, self.inner), self.rank, self.device = site.shape, rank, site.device
        self.name = f"{site.seed}/{site.place.path}/{site.place.role}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"D": (self.rank, self.inner), "U": (self.out, self.rank)}

    @property
    def cost(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def choose(self) -> None:
        generator = torch.Generator().manual_seed(stable_hash(self.name))
        for name, shape in self.shapes.items():
            start = torch.zeros(shape)
            if name == "D":
                start.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(start.to(self.device)))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            self.choose()
            self.fill(tensors, self.shapes)


class Beside(LateModule):
    """``U D`` beside the weight."""

    D: Tensor
    U: Tensor

    def factors(self) -> Factors:
        if "D" not in self._parameters:
            return Factors(torch.zeros(0, self.inner, device=self.device), torch.zeros(self.out, 0, device=self.device))
        return Factors(self.D, self.U)


class Behind(LateModule):
    """``h + U gelu(D h + b_D) + b_U`` on the output h of the linear."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"D": (self.rank, self.out), "U": (self.out, self.rank), "b_D": (self.rank,), "b_U": (self.out,)}

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        h = base(x)
        if "D" not in self._parameters:
            return h
        D, U, b_D, b_U = (getattr(self, name).to(h.dtype) for name in ("D", "U", "b_D", "b_U"))
        return h + F.linear(F.gelu(F.linear(h, D, b_D)), U, b_U)
