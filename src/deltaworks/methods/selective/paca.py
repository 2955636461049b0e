"""PaCA: train a few input columns of each frozen weight.

Paper: PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, Woo et al., 2025, arXiv:2503.01905 (ICLR).

Formula: W' = W with s D added to its columns idx; D [out, r], idx [r] distinct input columns drawn at random,
s = alpha / r. As factors: A [r, in] selects the columns, B = D. Forward: y = W x + s D x[idx], so that the backward
pass keeps x[idx] [tokens, r] alone and never the input [tokens, in].
Count: sum of r out (LLaMA-2-7B, seven linears, r = 8: 10,878,976).
Departure: the published code trains the columns inside the resident weight, which loses the base, small steps in
bfloat16, and every second update where the layers are not checkpointed; here the float32 change stands beside it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import ascending


class PaCATuner(Tuner):
    """``change`` [out, r] of the columns ``index`` [r] (int32, ascending)."""

    index: Tensor

    def __init__(self, site: Site, config: "PaCA") -> None:
        super().__init__()
        out, self.inner = site.shape
        if config.rank > self.inner:
            raise UserError(
                f"rank {config.rank} is larger than the {self.inner} input columns of {site.place.path!r}: "
                f"use at most {self.inner}, or other targets"
            )
        self.change = site.zeros(out, config.rank)
        self.scale = config.alpha / config.rank  # type: ignore[operator]
        index = torch.randperm(self.inner, generator=site.generator)[: config.rank].sort().values
        self.register_buffer("index", index.to(site.device, torch.int32))

    def selecting(self) -> Factors:
        return Factors(self.index, self.change, self.scale)

    def factors(self) -> Factors:
        rows = torch.arange(len(self.index), device=self.index.device)
        selector = self.change.new_zeros(len(self.index), self.inner).index_put(
            (rows, self.index.long()), self.change.new_ones(())
        )
        return Factors(selector, self.change, self.scale)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        index = tensors.get("index")
        if index is not None and not index.is_meta and not ascending(index, self.inner):
            raise UserError(f"tensor 'index' must hold ascending columns between 0 and {self.inner - 1}")
        super().restore(tensors)


@method(
    "paca",
    family="selective",
    paper="Woo et al., 2025, arXiv:2503.01905",
    kinds=("linear", "conv1d"),
    tuner=PaCATuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class PaCA(Config):
    targets: str = option("linear", "the paper: every linear layer of the blocks")
    rank: int = option(8, "number r of input columns", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
