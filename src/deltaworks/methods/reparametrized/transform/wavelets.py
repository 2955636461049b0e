"""Orthonormal wavelet transforms along the last dimension, periodic at the ends, in plain torch.

They equal PyWavelets' with mode="periodization". As they are orthonormal, the inverse is also the transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WAVELETS: dict[str, tuple[float, ...]] = {
    "haar": (2**-0.5, 2**-0.5),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db4": (
        *(0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854),
        *(-0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032),
    ),
    "sym4": (
        *(0.0322231006040427, -0.012603967262037833, -0.09921954357684722, 0.29785779560527736),
        *(0.8037387518059161, 0.49761866763201545, -0.02963552764599851, -0.07576571478927333),
    ),
}
"""Low-pass synthesis filters h; the high-pass ones are (-1)^j h[L - 1 - j] (Daubechies, 1992, table 6.1)."""


def taps(wavelet: str) -> list[tuple[int, int, float, float]]:
    """(shift, phase, low, high) of each tap: coefficient k reaches sample 2 (k + shift) + phase."""
    low = WAVELETS[wavelet]
    high = [(-1) ** j * value for j, value in enumerate(reversed(low))]
    return [(*divmod(j + 1 - len(low) // 2, 2), *pair) for j, pair in enumerate(zip(low, high, strict=True))]


def analysis(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    """One level: [..., n] with n even to the low and the high band, each [..., n / 2]."""
    phases = x[..., 0::2], x[..., 1::2]
    low = sum(h * phases[phase].roll(-shift, -1) for shift, phase, h, _ in taps(wavelet))
    high = sum(g * phases[phase].roll(-shift, -1) for shift, phase, _, g in taps(wavelet))
    return low, high  # type: ignore[return-value]  # a sum of at least two tensors


def synthesis(low: Tensor, high: Tensor, wavelet: str) -> Tensor:
    """The inverse of ``analysis``: two bands [..., n / 2] to [..., n]."""
    phases = [torch.zeros_like(low), torch.zeros_like(low)]
    for shift, phase, h, g in taps(wavelet):
        phases[phase] = phases[phase] + (h * low + g * high).roll(shift, -1)
    return torch.stack(phases, dim=-1).flatten(-2)


def bands(size: int, levels: int) -> list[int]:
    """Sizes of the bands, the lowest first, of ``size`` numbers padded to a multiple of 2^levels."""
    lowest = -(-size // 2**levels)
    return [lowest, *(lowest * 2**level for level in range(levels))]


def forward(x: Tensor, wavelet: str, levels: int) -> Tensor:
    """All bands, the lowest first: [..., n] to [..., padded n]; each level transforms the low band again."""
    low = F.pad(x, (0, sum(bands(x.shape[-1], levels)) - x.shape[-1]))
    found: list[Tensor] = []
    for _ in range(levels):
        low, high = analysis(low, wavelet)
        found.insert(0, high)
    return torch.cat([low, *found], dim=-1)


def inverse(coefficients: Tensor, wavelet: str, levels: int) -> Tensor:
    """The inverse of ``forward``, with its padding: [..., padded n] to [..., padded n]."""
    low, *found = coefficients.split(bands(coefficients.shape[-1], levels), dim=-1)
    for high in found:
        low = synthesis(low, high, wavelet)
    return low


def weighted(x: Tensor, gains: Tensor, wavelet: str) -> Tensor:
    """[..., n] with its low band times gains[0] and its high band times gains[1]; an odd n is padded with a zero."""
    low, high = analysis(F.pad(x, (0, x.shape[-1] % 2)), wavelet)
    return synthesis(gains[0] * low, gains[1] * high, wavelet)[..., : x.shape[-1]]


def singular_vectors(matrix: Tensor, rank: int, count: int, wavelet: str, levels: int) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors of the bands (0, 0) to (count - 1, count - 1) of ``H M H^T``.

    Shapes: M [out, in]; returns [sum of the bands of out, rank] and [sum of the bands of in, rank], float32. Signs:
    the largest entry of each left vector is positive, so that the same matrix always gives the same vectors.
    """
    rows, columns = (bands(size, levels)[:count] for size in matrix.shape)
    if matrix.device.type == "meta":
        left, right = (torch.empty(sum(sizes), rank, device="meta") for sizes in (rows, columns))
        return left, right
    turned = forward(matrix.double().T, wavelet, levels).T
    blocks = forward(turned, wavelet, levels)[: sum(rows), : sum(columns)]
    found = []
    for band, part in enumerate(blocks.split(rows)):
        U, _, V = torch.linalg.svd(part.split(columns, dim=1)[band], full_matrices=False)
        U, V = U[:, :rank], V[:rank].T
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        found.append((U * signs, V * signs))
    return torch.cat([U for U, _ in found]).float(), torch.cat([V for _, V in found]).float()
