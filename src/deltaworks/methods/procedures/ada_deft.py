"""ADA-DEFT: DEFT with a trained gate on each feed-forward layer, so that whole layers can be left out afterwards.

Paper: From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers, Runwal et al.,
2024, arXiv:2402.01911 (AAAI 2025). Its code does not hold this variant: this file is reconstructed from the abstract.

Formula: the feed-forward branch of block l becomes g_l (W2 O + b2), g_l a scalar that starts at 1; the loss gains the
density of `deft`, of g_l O. After training, gates with |g_l| below a threshold are set to 0.
Count: that of the method below, and one for each feed-forward layer.
Departure: the threshold and the place of the gate are unknown; here it is at the output of W2, so that it merges, and a
layer whose gate is 0 still runs (its merged W2 and b2 are zero: it can be cut).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.delta import Delta
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import OnTop, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.procedures.density import Density


class Gate(Tuner):
    """``gate`` [1] times the output of a linear."""

    decays = False
    adds = False

    def __init__(self, site: Site, config: "AdaDEFT") -> None:
        super().__init__()
        self.gate = site.ones(1)

    def weight(self, weight: Tensor) -> Tensor:
        return self.gate.to(weight.dtype) * weight

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.gate.to(bias.dtype) * bias

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        y = base(x)
        return self.gate.to(y.dtype) * y


class GatedDensity(Density):
    """The density of gated activations; in the end small gates close."""

    def __init__(self, delta: Delta, config: "AdaDEFT") -> None:
        super().__init__(delta, config)
        self.gates: dict[str, Any] = {i.place.path: i.tuner for i in delta.attached if i.tuner.config is config}

    def gate(self, path: str) -> Tensor | float:
        return self.gates[path].gate if path in self.gates else 1.0

    @torch.no_grad()
    def end(self) -> None:
        for tuner in self.gates.values():
            tuner.gate.mul_(tuner.gate.abs() >= self.config.close)

    def details(self) -> dict[str, Any]:
        gates = {path: round(float(tuner.gate.detach()), 6) for path, tuner in self.gates.items()}
        return {**super().details(), "ada_deft_gate": gates}


@method(
    "ada-deft",
    family="procedures",
    paper="Runwal et al., 2024, arXiv:2402.01911",
    kinds=("linear", "conv1d"),
    tuner=Gate,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class AdaDEFT(OnTop):
    targets: str = option("mlp.down", "the linears whose output gets a gate")
    weight: float = option(1.0, "w, the weight of the density of each stack", least=0)
    eps: float = option(1e-7, "smoothing: entries well below its root count as zeros", least=1e-12)
    threshold: float = option(0.0, "entries up to this size count as zeros in the record", least=0)
    close: float = option(0.05, "gates below this become 0 after training", least=0)

    def procedure(self, delta: Delta) -> Procedure:
        return GatedDensity(delta, self)
