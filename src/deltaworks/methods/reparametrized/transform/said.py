"""Intrinsic SAID: all weights move inside one random subspace, with one learned scale for each tensor.

Paper: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning, Aghajanyan et al., 2020,
arXiv:2012.13255 (ACL 2021).

Formula: W_i' = W_i + s_i P_i(v) for every tensor i of D_i entries, with v [d'] shared by all and started at 0, s_i one
number started at 1; the Fastfood transform P(v) = H G Pi H B v / (sqrt(L sum G^2) sqrt(D_i / L)), its first D_i
entries, with L the power of two that holds them, v cut or padded with zeros to L, B random signs [L], Pi a random
permutation, G normal [L] and H the un-normalised Walsh-Hadamard transform. scales=false leaves the s_i out (DID).
Count: d = d' + the number of tensors, whatever the model (20,000 of T5-base: 0.009 %).
Departure: the backward of H is H itself, its adjoint, while published code divides it by sqrt(L), which changes the
learning rate from tensor to tensor; B, Pi and G are made from the seed and never stored.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.anatomy import backbone
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.quantized import entries
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site

RADIX = 32
"""H is applied as a product with a matrix of this size along each of log_32(L) axes."""


def hadamard(size: int, like: Tensor) -> Tensor:
    """The matrix H [size, size] of +1 and -1 (Sylvester); ``size`` is a power of two."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x for x [L], L a power of two: H is the Kronecker product of small ones, one for each axis."""
    sizes: list[int] = []
    while RADIX ** len(sizes) < len(x):
        sizes.append(min(RADIX, len(x) // RADIX ** len(sizes)))
    y = x.view(sizes or [1])
    for size in sizes:
        y = torch.tensordot(y, hadamard(size, x), dims=([0], [0]))  # the axis moves to the end
    return y.reshape(-1)


class Fastfood(nn.Module):
    """The linear map P from [d'] to [D], of which a seed decides everything."""

    signs: Tensor
    permutation: Tensor
    gains: Tensor

    def __init__(self, inner: int, size: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        length = 1 << (size - 1).bit_length()
        self.size, self.length = size, length
        if device.type == "meta":
            signs, permutation, gains = torch.empty(min(inner, length)), torch.empty(length), torch.empty(length)
        else:
            signs = torch.randint(2, (length,), generator=generator)[:inner] * 2 - 1
            permutation = torch.randperm(length, generator=generator)
            gains = torch.randn(length, generator=generator)
            gains /= (size * gains.double().square().sum()).sqrt()  # sqrt(L sum G^2) sqrt(D / L)
        self.register_buffer("signs", signs.to(device, torch.int8), persistent=False)
        self.register_buffer("permutation", permutation.to(device, torch.int32), persistent=False)
        self.register_buffer("gains", gains.to(device), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        signed = v[: self.length] * self.signs
        mixed = walsh_hadamard(F.pad(signed, (0, self.length - len(signed)))).index_select(0, self.permutation)
        return walsh_hadamard(mixed * self.gains)[: self.size]


class SAIDTuner(Tuner):
    """The shared v [d'] and, for each parameter of one module, its s and its P."""

    decays = False

    def __init__(self, site: Site, config: "SAID") -> None:
        super().__init__()
        self.v = site.shared("v", lambda: site.zeros(config.inner(site)))
        self.scales, self.transforms = nn.ParameterDict(), nn.ModuleDict()
        for name, parameter in site.module.named_parameters(recurse=False):

            def fastfood(size: int = entries(parameter)) -> Fastfood:
                return Fastfood(len(self.v), size, site.generator, site.device)

            self.transforms[name] = site.shared(("transform", id(parameter)), fastfood)
            if config.scales:
                self.scales[name] = site.shared(("scale", id(parameter)), site.ones)

    def tensor(self, name: str, base: Tensor) -> Tensor:
        if name not in self.transforms:
            return base
        change = self.transforms[name](self.v.to(base.device))
        change = self.scales[name] * change if name in self.scales else change
        return base + change.view(base.shape).to(base.dtype)


@method(
    "said",
    family="reparametrized/transform",
    paper="Aghajanyan et al., 2020, arXiv:2012.13255",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=SAIDTuner,
    learning_rate=3e-3,
    tried=(3e-3, 1e-2, 3e-2),
    small={"dimension": 300},
)
class SAID(Config):
    targets: str = option("all", "which weights move, never the output head's own; the paper: all of the backbone")
    dimension: int = option(20_000, "d: all that is trained, the scales included (the paper: 100 to 500,000)", least=1)
    scales: bool = option(True, "a learned scale for each tensor; false is the paper's DID")

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def inner(self, site: Site) -> int:
        """d': what is left of d for v. Raises UserError where the scales take it all."""
        modules = [site.model.get_submodule(place.path) for place in self.places(site.anatomy)]
        tensors = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        inner = self.dimension - self.scales * len(tensors)
        if inner < 1:
            raise UserError(
                f"said: the scales of {len(tensors)} tensors leave nothing of dimension={self.dimension}: raise it, "
                "or take scales=false"
            )
        return inner
