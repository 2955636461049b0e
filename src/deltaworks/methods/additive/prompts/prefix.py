"""Prefix tuning: virtual keys and values in front of every attention, flat or made by an MLP while training.

Paper: Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li and Liang, 2021, arXiv:2101.00190. Flat form:
P-tuning v2, Liu et al., 2021, arXiv:2110.07602.

Formula: attention over [P_k ; K] and [P_v ; V] with P_k, P_v [l, d_kv] in each attention (d_kv over all key heads).
MLP form: P = tanh(E M_1^T + c_1) M_2^T + c_2 with M_2 [2 d_kv, m], c_2 [2 d_kv] of each attention and E [l, d],
M_1 [m, d], c_1 [m] of its stack (encoder self, decoder self, decoder cross); only P is kept after training.
Count: flat and stored, 2 l d_kv for each attention; trained in the MLP form, l d + d m + m for each stack and
2 d_kv (m + 1) for each attention.
Departure: prefix keys stand outside the text's positions (no rotation, no relative bias, never behind a window), so a
cache holds the text alone and padding cannot part the two; the published code moves the text back by l (``shifted``).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Heads, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.prompts.prefixes import Shift, attended


class FlatPrefixTuner(Tuner):
    """Free virtual keys and values [kv_heads, l, head_dim] of one attention.

    With init "gate" they have a softmax of their own, times tanh(g) with g = 0 at the start (LLaMA-Adapter,
    arXiv:2303.16199, equation 6).
    """

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        heads, size = site.heads
        self.key, self.value = site.normal(heads, config.length, size), site.normal(heads, config.length, size)
        self.gate = site.zeros(1) if config.init == "gate" else None

    def around(self, base: Callable[[Heads], Tensor], heads: Heads) -> Tensor:
        if self.gate is None:
            return base(heads.prepend(self.key, self.value))
        return base(heads) + torch.tanh(self.gate).to(heads.query.dtype) * attended(heads, self.key, self.value)


class Source(nn.Module):
    """What the attentions of one stack share: ``E`` and the hidden layer."""

    def __init__(self, site: Site, config: "Prefix") -> None:
        super().__init__()
        width = site.width
        self.E = site.normal(config.length, width)
        self.M1, self.c1 = site.kaiming(config.width, width), site.uniform(config.width, bound=width**-0.5)

    def forward(self) -> Tensor:
        """The hidden values [l, m]."""
        return torch.tanh(F.linear(self.E, self.M1, self.c1))


class PrefixTuner(Tuner):
    """The prefix of one attention as its stack's MLP makes it; one that was restored is flat."""

    source: Source | None

    def __init__(self, site: Site, config: "Prefix") -> None:
        super().__init__()
        self.heads, self.length = site.heads, config.length
        features = 2 * self.heads[0] * self.heads[1]
        stack = ("prefix", site.member, site.place.stack, site.place.role)
        self.source = site.shared(stack, lambda: Source(site, config))
        self.M2 = site.kaiming(features, config.width)
        self.c2 = site.uniform(features, bound=config.width**-0.5)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, l, head_dim]."""
        if self.source is None:
            return self.key, self.value
        made = F.linear(self.source(), self.M2, self.c2).view(self.length, 2, *self.heads)
        key, value = made.permute(1, 2, 0, 3)  # [2, kv_heads, l, head_dim]
        return key, value

    def around(self, base: Callable[[Heads], Tensor], heads: Heads) -> Tensor:
        return base(heads.prepend(*self.prefix()))

    def stored(self) -> dict[str, Tensor]:
        with torch.no_grad():
            key, value = self.prefix()
        return {"key": key.detach().contiguous(), "value": value.detach().contiguous()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets a flat prefix and drops the MLP."""
        shape = (self.heads[0], self.length, self.heads[1])
        if tensors.keys() != {"key", "value"}:
            raise UserError(f"a prefix is stored as key and value, not as {', '.join(sorted(tensors)) or 'nothing'}")
        for name, tensor in tensors.items():
            if tensor.shape != shape:
                raise UserError(f"tensor {name!r} has shape {list(tensor.shape)}, not {list(shape)}")
        device = next(self.parameters()).device
        if self.source is not None:
            self.source = None
            del self.M2, self.c2
        self.key, self.value = (nn.Parameter(tensors[name].detach().to(device, copy=True)) for name in ("key", "value"))


@method(
    "prefix",
    family="additive/prompts",
    paper="Li and Liang, 2021, arXiv:2101.00190",
    kinds=("keyvalue",),
    tuner=PrefixTuner,
    identity=False,
    learning_rate=1e-3,
    tried=(3e-4, 1e-3, 3e-3),
    small={"length": 4, "width": 16},
)
class Prefix(Config):
    targets: str = option("*attention.kv", "the attentions that get virtual keys and values")
    length: int = option(30, "number of virtual keys l", least=0)
    width: int = option(512, "width m of the MLP that makes the prefix; a saved prefix is without it", least=1)


@method(
    "prefix-flat",
    family="additive/prompts",
    paper="Liu et al., 2021, arXiv:2110.07602",
    kinds=("keyvalue", "trunk"),
    identity=False,
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
    small={"length": 4},
)
class FlatPrefix(Config):
    targets: str = option("*attention.kv", "the attentions that get virtual keys and values")
    length: int = option(30, "number of virtual keys l", least=0)
    init: str = option("random", "random: N(0, 1); gate: N(0, 1) behind a zero gate", choices=("random", "gate"))
    shifted: bool = option(False, "move the text back by l positions, as huggingface/peft does")

    def places(self, anatomy):  # type: ignore[no-untyped-def]
        places = anatomy.select(self.targets, ("keyvalue",))
        stacks = {place.stack for place in places} if self.shifted else set()
        return [p for p in anatomy.places if p in places or (p.kind == "trunk" and p.stack in stacks)]

    def tuner(self, site: Site) -> Tuner:
        return Shift(self.length) if site.place.kind == "trunk" else FlatPrefixTuner(site, self)
