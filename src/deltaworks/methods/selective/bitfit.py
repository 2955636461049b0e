"""BitFit: train the bias vectors alone.

Paper: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, Ben Zaken et
al., 2021, arXiv:2106.10199 (ACL 2022).

Formula: y = W x + (b + c) with c [out] trained, for the linear layers, convolutions and norms that have a bias.
Count: the number of bias entries (BERT-base with its pooler: 102,912).
Departure: the published code picks parameters by the word "bias" in their names, which misses shifts called beta and
hits tables of relative positions; here the kind of the module decides.
"""

from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.core.weights import base_tensors


class BitFitTuner(Tuner):
    """The change ``c`` [out] of the bias, or an added bias where the base has none."""

    decays = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        bias = site.bias
        self.change = site.zeros(site.shape[0] if bias is None else bias.shape[0])

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.change if bias is None else bias + self.change


@method(
    "bitfit",
    family="selective",
    paper="Ben Zaken et al., 2021, arXiv:2106.10199",
    kinds=("linear", "conv1d", "conv2d", "norm", "parameters", "matrix"),
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"nothing": "none of the targets has a bias: add=true adds biases that start at zero, or choose 'ln'"},
)
class BitFit(Config):
    targets: str = option("all", "whose biases, never the output head's; the paper's half of them: attention.q,mlp.up")
    add: bool = option(
        False, "give linear layers without a bias one that starts at zero (no longer the paper's method)"
    )

    def places(self, anatomy):  # type: ignore[no-untyped-def]
        return [place for place in super().places(anatomy) if place.role != "head"]

    def tuner(self, site: Site) -> Tuner | None:
        missing = site.bias is None
        addable = missing and self.add and site.place.kind != "norm" and site.place.bias in base_tensors(site.module)
        return BitFitTuner(site) if not missing or addable else None
