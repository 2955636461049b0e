"""FourierFT: the weight change is the inverse Fourier transform of a few trained coefficients.

Paper: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, Gao et al., 2024, arXiv:2405.03003 (ICML).

Formula: W' = W + alpha Re(IFFT2(S)), with S [out, in] zero but for n trained coefficients c [n] at fixed random
places; IFFT2 divides by out in. Places are the first n of a seeded permutation, the same for weights of one shape.
Count: n for each weight (RoBERTa-base, query and value, n = 1000: 24,000).
Departure: the coefficients start at 0, so that step 0 is the base; init=normal is the N(0, 1) of the paper and of the
published code, which nothing needs, as the change is linear in c.
"""

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


def places(size: int, count: int, seed: int) -> Tensor:
    """``count`` distinct numbers below ``size``, int64. With seed 777 those of huggingface/peft."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


class FourierTuner(Tuner):
    """The coefficients ``spectrum`` [n] at ``entries`` [n] of the row-major spectrum; these are made from the seed."""

    entries: Tensor

    def __init__(self, site: Site, config: "FourierFT") -> None:
        super().__init__()
        self.shape, self.alpha, count = site.shape, config.alpha, config.frequencies
        size = self.shape[0] * self.shape[1]
        if count > size:
            raise UserError(
                f"fourierft: frequencies={count} is more than the {size} entries of {site.place.path!r}: "
                f"use at most {size}, or other targets"
            )
        self.spectrum = site.normal(count) if config.init == "normal" else site.zeros(count)

        def entries() -> Tensor:
            meta = site.device.type == "meta"
            return torch.empty(count, dtype=torch.int64) if meta else places(size, count, site.seed)

        shared = site.shared(("fourierft", self.shape, count), entries)
        self.register_buffer("entries", shared.to(site.device), persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        # there is no Fourier transform in half precision
        spectrum = self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))
        out, inner = self.shape
        dense = spectrum.new_zeros(out * inner).scatter(0, self.entries, spectrum).view(out, inner)
        return weight + (self.alpha * torch.fft.ifft2(dense).real).to(weight.dtype)


@method(
    "fourierft",
    family="reparametrized/transform",
    paper="Gao et al., 2024, arXiv:2405.03003",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=FourierTuner,
    learning_rate=3e-3,
    tried=(3e-3, 1e-2, 3e-2),
    small={"frequencies": 64},
)
class FourierFT(Config):
    targets: str = option("linear", "the paper: attention.q,attention.v")
    frequencies: int = option(1000, "n: trained coefficients of each weight", least=1)
    alpha: float = option(150.0, "scale of the change; the paper: 29 to 141 on GLUE, 300 for large models", least=0)
    init: str = option("zeros", "zeros: step 0 is the base; normal: the paper's N(0, 1)", choices=("zeros", "normal"))
