"""UniPELT: LoRA, a prefix and an adapter in every block, each behind a gate computed from its own input.

Paper: UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, Mao et al., 2021, arXiv:2110.07577.

Formula: gate G = mean over the tokens t of sigmoid(w . h_t + c), one number for each example and module;
LoRA on q and v: W x + G B A x (the gate in place of alpha / r); prefix: attention over [G P_k ; K], [G P_v ; V];
adapter in Pfeiffer's place: z + G (U f(D z + b_D) + b_U).
Count for each block with self-attention alone: 4 r d + 2 l d_kv + 2 m d + m + d, and 4 (d + 1) for the gates.
Departure: the published mean also runs over padding, here over real tokens; and where attention is causal each
token has its own gate, since a mean over the sequence would show it the tokens to come and differ with a cache.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.anatomy import Place
from deltaworks.core.forms import Heads, Tuner
from deltaworks.core.registry import Config, configure, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.additive.adapters.pfeiffer import PfeifferTuner
from deltaworks.methods.additive.prompts.prefix import FlatPrefixTuner


class Gate(nn.Module):
    """G for one module: [batch, 1, 1], or [batch, length, 1] where attention is causal."""

    def __init__(self, site: Site, features: int, std: float | None = None) -> None:
        super().__init__()
        bound = features**-0.5
        self.w = site.uniform(features, bound=bound) if std is None else site.normal(features, std=std)
        self.c = site.uniform(1, bound=bound) if std is None else site.normal(1, std=std)
        self.causal = site.causal
        self.mask = None if site.trunk is None else site.watch(site.trunk.path, "mask")

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden [batch, length, features]."""
        gates = torch.sigmoid(F.linear(hidden, self.w[None].to(hidden.dtype), self.c.to(hidden.dtype)))
        if self.causal:
            return gates
        mask = None if self.mask is None else self.mask.value
        if mask is None:
            return gates.mean(1, keepdim=True)
        real = mask[:, -hidden.shape[1] :, None].to(hidden.dtype)  # with a cache the mask is the longer one
        return (gates * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


class GatedLoRATuner(Tuner):
    """``W x + G B A x``."""

    def __init__(self, site: Site, config: "UniPELT") -> None:
        super().__init__()
        site.check_rank(config.rank)
        out, inner = site.shape
        self.A, self.B = site.kaiming(config.rank, inner), site.zeros(out, config.rank)
        self.gate = Gate(site, inner)

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return base(x) + self.gate(x) * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class GatedPrefixTuner(FlatPrefixTuner):
    """Virtual keys and values ``G P_k`` and ``G P_v``."""

    def __init__(self, site: Site, config: "UniPELT") -> None:
        super().__init__(site, configure("prefix-flat", length=config.length))
        self.opening = Gate(site, site.width)

    def around(self, base: Callable[[Heads], Tensor], heads: Heads) -> Tensor:
        gate = self.opening(heads.hidden)
        if not self.opening.causal:
            return base(heads.prepend(gate[:, None] * self.key, gate[:, None] * self.value))
        # a gate for each query: the prefix lives in features of its own behind the others, [text ; prefix]
        size, others = self.key.shape[-1], heads.query.shape[-1]
        split = heads._replace(
            query=torch.cat([heads.query, gate[:, None] * heads.query[..., :size]], dim=-1),
            key=F.pad(heads.key, (0, size)),
            value=F.pad(heads.value, (0, size)),
        )
        output = base(split.prepend(F.pad(self.key, (others, 0)), F.pad(self.value, (others, 0))))
        return output[..., :others] + F.pad(gate[:, :, None] * output[..., others:], (0, others - size))


class GatedAdapterTuner(PfeifferTuner):
    """Pfeiffer's adapter with ``G`` on what it adds."""

    def __init__(self, site: Site, config: "UniPELT") -> None:
        super().__init__(site, configure("pfeiffer", reduction=config.reduction, init="normal"))
        self.gate = Gate(site, site.width, std=0.02)

    def change(self, x: Tensor) -> Tensor:
        return self.gate(x) * super().change(x)


@method(
    "unipelt",
    family="hybrid",
    paper="Mao et al., 2021, arXiv:2110.07577",
    kinds=("keyvalue", "sublayer"),  # which a model must have for it
    identity=False,
    learning_rate=1e-3,
    tried=(1e-3, 3e-3, 1e-2),
    small={"length": 4},
)
class UniPELT(Config):
    targets: str = option("attention.q,attention.v", "the projections with a gated low-rank change")
    rank: int = option(8, "rank r of the gated change", least=1)
    length: int = option(10, "number of virtual keys l in every attention", least=0)
    reduction: int = option(16, "the adapter's bottleneck is the width d of the model divided by this", least=1)

    def tuner(self, site: Site) -> Tuner:
        kinds: dict[str, Any] = {"linear": GatedLoRATuner, "conv1d": GatedLoRATuner, "keyvalue": GatedPrefixTuner}
        return kinds.get(site.place.kind, GatedAdapterTuner)(site, self)

    def places(self, anatomy: Any) -> list[Place]:
        chosen = {
            *anatomy.select(self.targets, ("linear", "conv1d")),
            *anatomy.select("*attention.kv", ("keyvalue",)),
            *configure("pfeiffer").places(anatomy),
        }
        return [place for place in anatomy.places if place in chosen]
