"""Norm tuning: train the gains (and shifts) of the normalisation layers alone.

Paper: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, Zhao et al., 2023,
arXiv:2312.11420 (ICLR 2024); for text before it: Qi et al., 2022, arXiv:2211.08682.

Formula: y = (g + c) * normalised(x) + (b + e) with g, b [d] frozen and the changes c, e [d] trained; relative:
y = g (1 + c) * normalised(x) + (b + e), which fits models whose gains are far from 1.
Count: d for each norm, 2 d where it has a shift (Llama-3.2-3B: 175,104; T5-large: 124,928).
Departure: the changes are float32 beside the frozen gain, because a gain in bfloat16, trained itself, never moves
at small learning rates (its spacing near 1 is 0.004 to 0.008).
"""

import torch
from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class NormTuner(Tuner):
    """The changes of a gain and of a shift, [d] each."""

    decays = False

    def __init__(self, site: Site, config: "LN") -> None:
        super().__init__()
        width, _ = site.shape
        self.gain = site.zeros(width)
        self.shift = site.zeros(width) if config.shift and site.bias is not None else None
        self.relative = config.relative
        self.offset = offset(site) if config.relative else 0.0

    def weight(self, weight: Tensor) -> Tensor:
        return weight + (self.gain * (weight + self.offset) if self.relative else self.gain)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.shift is None else bias + self.shift


def offset(site: Site) -> float:
    """What the norm adds to its weight before it multiplies: 1 in Gemma's family, else 0.

    An RMSNorm gives back its gain for an input of ones.
    """
    if site.device.type == "meta" or site.bias is not None or isinstance(site.module, torch.nn.LayerNorm):
        return 0.0
    with torch.no_grad():
        gain = site.module(torch.ones_like(site.matrix))
    return float((gain - site.matrix).float().mean() > 0.5)


@method(
    "ln",
    family="selective",
    paper="Zhao et al., 2023, arXiv:2312.11420",
    kinds=("norm",),
    tuner=NormTuner,
    learning_rate=3e-3,
    tried=(3e-3, 1e-2, 3e-2),
)
class LN(Config):
    targets: str = option("norm", "which norms; all, the final one included")
    shift: bool = option(True, "train the shifts too, where there are any")
    relative: bool = option(False, "train the gain as g (1 + c) instead of g + c")
