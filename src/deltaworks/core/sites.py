"""A site: one operation of a model, as the tuner that is made for it sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.anatomy import Anatomy
from deltaworks.core.board import Tap
from deltaworks.core.errors import UserError
from deltaworks.core.paths import parent_of
from deltaworks.core.places import LINEAR, Place, features_of
from deltaworks.core.weights import base_tensors, matrix_of, part_of


class Site:
    """One place of one model, as a tuner sees it while it is made.

    ``shape`` is (out, in) of the weight as a matrix; for sub-layers and blocks ``width`` is the number of
    features that leave it. Parameters made here are float32, on the device of the place, and random only
    through the adapter's seed and the path of the place.
    """

    def __init__(
        self, place: Place, model: nn.Module, anatomy: Anatomy, seed: int, shared: dict[Hashable, Any]
    ) -> None:
        self.place, self.model, self.anatomy = place, model, anatomy
        self.module = model.get_submodule(place.path)
        self.seed, self.member = seed, 0
        self._shared = shared
        self._generator: torch.Generator | None = None
        self.taps: list[tuple[nn.Module, Tap]] = []

    def at(self, place: Place) -> Site:
        """Another place of the same model, for what is shared between places."""
        site = Site(place, self.model, self.anatomy, self.seed, self._shared)
        site.member = self.member
        return site

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The base parameters by name; a quantized weight as a plain tensor."""
        return {name: tensor for name, tensor in base_tensors(self.module).items() if tensor is not None}

    @property
    def matrix(self) -> Tensor:
        """The base weight as the matrix [out, in] that a tuner's ``weight`` gets (1-D for norms)."""
        return matrix_of(self.place, base_tensors(self.module)[self.place.parameter])

    @property
    def shape(self) -> tuple[int, int]:
        if self.place.kind in LINEAR:  # without reading a weight, which may be quantized
            inner, out = features_of(self.module)
            return (out if self.place.part is None else self.place.part[1] - self.place.part[0], inner)
        matrix = self.matrix
        return (matrix.shape[0], matrix.shape[1]) if matrix.dim() == 2 else (matrix.shape[0], 1)

    @property
    def bias(self) -> Tensor | None:
        """The base bias [out], if there is one."""
        bias, expert = base_tensors(self.module).get(self.place.bias), self.place.expert
        return bias if bias is None else part_of(self.place, bias if expert is None else bias[expert])

    @property
    def width(self) -> int:
        """Features of the residual stream at this place."""
        beside = [place for place in self.anatomy.places if place.stack == self.place.stack and place.part is None]
        # the stages of a pyramid differ in width, so the own block comes first
        for place in sorted(beside, key=lambda place: place.block != self.place.block):
            if place.role in ("attention.o", "mlp.down"):
                return self.at(place).shape[0]
        config = getattr(self.module, "config", None) or getattr(self.model, "config", None)
        width = getattr(config, "hidden_size", None)
        if width is None:
            raise UserError(f"the width of {self.place.path!r} cannot be found in {type(self.model).__name__}")
        return int(width)

    @property
    def heads(self) -> tuple[int, int]:
        """(key/value heads, features of a head) of the attention that this place is, or lies in."""
        section = self.place.role.split(".")[0]
        mine = (self.place.stack, self.place.block, section)
        beside = [p for p in self.anatomy.places if (p.stack, p.block, p.role.split(".")[0]) == mine]
        paths = [self.place.path, *(path for place in beside for path in (place.path, parent_of(place.path)))]
        owners = [self.model.get_submodule(path) for path in paths]
        names = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
        sizes = (getattr(owner, name, None) for owner in owners for name in names)
        size = next((size for size in sizes if isinstance(size, int)), None)
        for place in beside:
            if place.role == f"{section}.k" and size:
                return self.at(place).shape[0] // size, size
        raise UserError(f"the key and value heads of {self.place.path!r} cannot be found")

    def check_rank(self, rank: int) -> None:
        """Raises UserError where a rank is larger than the layer allows."""
        out, inner = self.shape
        if rank > min(out, inner):
            raise UserError(
                f"rank {rank} is larger than {self.place.name!r} allows ({out} x {inner}): "
                f"use at most {min(out, inner)}, or other targets"
            )

    @property
    def trunk(self) -> Place | None:
        """The trunk that this place belongs to."""
        trunks = (place for place in self.anatomy.places if place.kind == "trunk")
        return next((place for place in trunks if place.stack == self.place.stack), None)

    @property
    def causal(self) -> bool:
        """Whether the attention around this place sees only the tokens before."""
        trunk = self.model if self.trunk is None else self.model.get_submodule(self.trunk.path)
        return is_causal(trunk)

    @property
    def device(self) -> torch.device:
        tensor = next(self.module.parameters(), None)
        tensor = tensor if tensor is not None else next(self.model.parameters(), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def generator(self) -> torch.Generator:
        """Random numbers (on the CPU) that depend on the adapter's seed and on this place alone."""
        if self._generator is None:
            name = f"{self.seed}/{self.place.name}/{self.place.role}"
            self._generator = torch.Generator().manual_seed(stable_hash(name))
        return self._generator

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """One object for all sites of this adapter that ask with the same key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, device=self.device))

    def ones(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape, device=self.device))

    def normal(self, *shape: int, std: float = 1.0) -> nn.Parameter:
        """N(0, std^2) entries."""
        return self._random(shape, lambda tensor: tensor.normal_(0, std, generator=self.generator))

    def truncated(self, *shape: int, std: float) -> nn.Parameter:
        """N(0, std^2) entries, drawn again beyond two standard deviations."""
        ends = (-2 * std, 2 * std)
        return self._random(shape, lambda tensor: nn.init.trunc_normal_(tensor, 0.0, std, *ends, self.generator))

    def uniform(self, *shape: int, bound: float) -> nn.Parameter:
        """U(-bound, bound) entries."""
        return self._random(shape, lambda tensor: tensor.uniform_(-bound, bound, generator=self.generator))

    def kaiming(self, *shape: int) -> nn.Parameter:
        """U(-1/sqrt(in), 1/sqrt(in)) with in = shape[-1]: Kaiming-uniform with a = sqrt 5, as nn.Linear has it."""
        return self.uniform(*shape, bound=shape[-1] ** -0.5)

    def _random(self, shape: tuple[int, ...], fill: Callable[[Tensor], Tensor]) -> nn.Parameter:
        if self.device.type == "meta":
            return nn.Parameter(torch.empty(shape, device="meta"))
        return nn.Parameter(fill(torch.empty(shape)).to(self.device))

    def watch(self, path: str, side: str) -> Tap:
        """The "input", "output", token "mask" or whole "call" of another module, as it passes in each forward."""
        tap = Tap(side)
        self.taps.append((self.model.get_submodule(path), tap))
        return tap


def is_causal(trunk: nn.Module) -> bool:
    """Whether self-attention in a trunk sees only the tokens before."""
    return any(getattr(module, "is_causal", False) is True for module in trunk.modules())


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
