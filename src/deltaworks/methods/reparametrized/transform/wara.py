"""WaRA and Tiny-WaRA: a low-rank change of the wavelet bands of a weight's input and output.

Paper: WaRA, Heidari et al., 2025, arXiv:2506.24092. Reconstructed from the abstracts and a figure, nothing else of it.
Formula, with H the orthonormal wavelet transform (periodic, L levels, L + 1 bands), H_b its rows for band b:
feature: W' = W + s sum_b H_out,b^T B_b A_b H_in,b; A_b [r, in_b], B_b [out_b, r], s = alpha / r.
shared: one pair A, B for both bands (one level); with Haar W' = W + s (B A) (x) I_2.
token: y = W x + s IDWT(g_c B A C_c), with C the bands LL, LH, HL, HH of x over (features, tokens), g [4].
spatial: the same over the two axes of the grid of image patches, A [r, in], B [out, r]; tokens before it have g = 1.
basis=svd (Tiny-WaRA): B_b A_b = U_b R_b V_b^T with U_b, V_b the first singular vectors of band (b, b) of
H_out W H_in^T, made again from the base, and R_b [r, r] or diagonal [r], zero at the start.
Count: feature r (in + out), shared r (in + out) / 2 (768 x 768, r = 8: 6,144), token the same + 4, spatial r (in + out)
+ 4; Tiny-WaRA r^2 (or r) for each pair. Sizes count as padded to a multiple of 2^L.
Departure: the figure's one pair for all bands cancels the transform (shared), so the default has a pair for each band.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.reparametrized.transform.wavelets import (
    WAVELETS,
    analysis,
    bands,
    inverse,
    singular_vectors,
    synthesis,
    weighted,
)


class WaRATuner(Tuner):
    """Pairs A_b, B_b: one for each band (``feature``) or one for all. The wavelets act on the factors, not on x."""

    U: Tensor  # Tiny-WaRA: the U_b one below the other, and the V_b, [., r]
    V: Tensor

    def __init__(self, site: Site, config: "WaRA") -> None:
        super().__init__()
        self.shape, self.wavelet, rank = site.shape, config.wavelet, config.rank
        self.levels = 0 if config.mode == "spatial" else config.levels  # of the features
        sizes = [bands(size, self.levels) for size in site.shape]
        if rank > (most := min(*sizes[0], *sizes[1])):
            raise UserError(
                f"wara: rank {rank} is larger than the narrowest band of {site.place.path!r} allows: "
                f"use at most {most}, fewer levels, or other targets"
            )
        self.scale = config.alpha / rank  # type: ignore[operator]
        pairs = len(sizes[0]) if config.mode == "feature" else 1
        self.repeats = len(sizes[0]) // pairs
        self.rows, self.columns = (size[:pairs] for size in sizes)
        self.tiny = config.basis != "trained"
        if self.tiny:
            shape = (rank, rank) if config.basis == "svd" else (rank,)
            self.R = nn.ParameterList(site.zeros(*shape) for _ in range(pairs))
            U, V = singular_vectors(site.matrix.detach(), rank, pairs, self.wavelet, self.levels)
            self.register_buffer("U", U, persistent=False)
            self.register_buffer("V", V, persistent=False)
        else:
            self.A = nn.ParameterList(site.kaiming(rank, size) for size in self.columns)
            self.B = nn.ParameterList(site.zeros(size, rank) for size in self.rows)

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """A_b [r, in_b] and B_b [out_b, r]."""
        if not self.tiny:
            return list(self.A), list(self.B)
        up = [U @ R if R.dim() == 2 else U * R for U, R in zip(self.U.split(self.rows), self.R, strict=True)]
        return [V.T for V in self.V.split(self.columns)], up

    def factors(self) -> Factors:
        """[bands r, in] and [out, bands r]: every pair taken back from its band by the inverse transform."""
        A, B = self.pairs()
        out, inner = self.shape
        down = inverse(torch.block_diag(*A * self.repeats), self.wavelet, self.levels)[:, :inner]
        up = inverse(torch.block_diag(*[b.T for b in B] * self.repeats), self.wavelet, self.levels)[:, :out]
        return Factors(down, up.T, self.scale)


class GainTuner(WaRATuner):
    """One pair for all bands, and a gain for each of LL, LH, HL, HH: neighbouring tokens mix where these differ."""

    decays = False  # weight decay would pull the gains to zero
    factors = Tuner.factors  # not a change of the weight, so form 3

    def __init__(self, site: Site, config: "WaRA") -> None:
        super().__init__(site, config)
        self.gains = site.ones(2, 2)  # [first axis low or high, second axis low or high]

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        if x.dim() < 3:
            raise UserError("wara: modes token and spatial need inputs [batch, tokens, features]: use mode=feature")
        A, B, scale = WaRATuner.factors(self)
        # the gains act between the factors, where a token is r numbers wide: the token transform commutes with them
        inner = F.linear(x, A.to(x.dtype))
        mixed = self.over_tokens(inner) if self.levels else self.over_grid(inner)
        return base(x) + F.linear(mixed, (scale * B).to(x.dtype))

    def over_tokens(self, u: Tensor) -> Tensor:
        """[..., tokens, 2 r] with the bands of the features side by side; the tokens are padded to an even number."""
        u = u.unflatten(-1, (2, -1)).movedim(-3, -1)  # [..., 2, r, tokens]
        gains = self.gains.to(u.dtype).T[:, :, None, None]
        return weighted(u, gains, self.wavelet).movedim(-1, -3).flatten(-2)

    def over_grid(self, u: Tensor) -> Tensor:
        """[..., tokens, r], of which the last ones are a square grid of patches."""
        side = isqrt(u.shape[-2])
        first, patches = u.split([u.shape[-2] - side**2, side**2], dim=-2)
        grid, gains = patches.unflatten(-2, (side, side)).movedim(-1, -3), self.gains.to(u.dtype)
        halves = analysis(F.pad(grid.mT, (0, side % 2)), self.wavelet)  # each [..., r, width, height / 2]
        low, high = (weighted(half.mT, gain, self.wavelet).mT for half, gain in zip(halves, gains, strict=True))
        grid = synthesis(low, high, self.wavelet)[..., :side].mT
        return torch.cat([first, grid.movedim(-3, -1).flatten(-3, -2)], dim=-2)


@method(
    "wara",
    family="reparametrized/transform",
    paper="Heidari et al., 2025, arXiv:2506.24092",
    kinds=("linear", "conv1d", "conv2d"),
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
    small={"rank": 4},
)
class WaRA(Config):
    targets: str = option("linear", "the paper: projections of attention and feed-forward")
    rank: int = option(8, "rank r of each pair", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    wavelet: str = option("haar", "the orthonormal filter", choices=WAVELETS)
    levels: int = option(1, "L: how often the low band is split again; above 1 with mode=feature", least=1, most=3)
    mode: str = option("feature", "what is transformed", choices=("feature", "shared", "token", "spatial"))
    basis: str = option("trained", "svd: Tiny-WaRA", choices=("trained", "svd", "svd-diagonal"))

    def tuner(self, site: Site) -> Tuner:
        if self.levels > 1 and self.mode != "feature":
            raise UserError(f"wara: levels={self.levels} needs mode=feature: the bands of the others are of one size")
        if self.mode in ("feature", "shared"):
            return WaRATuner(site, self)
        if site.causal or site.place.kind == "conv2d":
            why = "a token would see a later one" if site.causal else "it is a convolution"
            raise UserError(f"wara: mode={self.mode} does not fit {site.place.path!r}, as {why}: use mode=feature")
        if self.mode == "spatial" and not any(isinstance(module, nn.Conv2d) for module in site.model.modules()):
            raise UserError(f"wara: mode=spatial needs image patches, and {type(site.model).__name__} has none")
        return GainTuner(site, self)
