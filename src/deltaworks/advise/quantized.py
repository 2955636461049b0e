"""What a quantized base weighs: the linear layers of the trunk in 4 or 8 bits, as bitsandbytes stores them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from torch import Tensor, nn

from deltaworks.advise.bodies import Body
from deltaworks.core.errors import UserError, nearest

BLOCK = 64  # entries that share a scale
DOUBLE_BLOCK = 256  # scales that share a scale (Dettmers et al., 2023, arXiv:2305.14314, double quantization)


def nf4_bytes(weight: Tensor) -> int:
    """Half a byte for each entry, a byte for the scale of each block, and a float32 scale for 256 of these."""
    blocks = ceil(weight.numel() / BLOCK)
    return ceil(weight.numel() / 2) + blocks + 4 * ceil(blocks / DOUBLE_BLOCK)


def int8_bytes(weight: Tensor) -> int:
    """A byte for each entry and a float32 scale for each row."""
    return weight.numel() + 4 * weight.shape[0]


FORMATS = {"nf4": nf4_bytes, "int8": int8_bytes}


@dataclass(frozen=True)
class Quantized:
    """The ``weights`` that are quantized, the bytes that this saves, and those of the largest one in full.

    One weight at a time is dequantized for its product.
    """

    weights: tuple[Tensor, ...] = ()
    saved: int = 0
    largest: int = 0


def quantized(body: Body, quantize: str | None) -> Quantized:
    """What quantizing does to a base. Raises UserError for a format that is not known."""
    if quantize is None:
        return Quantized()
    if quantize not in FORMATS:
        raise UserError(f"quantize={quantize!r} is not known; {nearest(quantize, FORMATS)}")
    size_of = FORMATS[quantize]
    weights = tuple(quantizable(body))
    if not weights:
        raise UserError(f"{body.name} has no linear layers in its blocks, so there is nothing to quantize")
    whole = [weight.numel() * weight.element_size() for weight in weights]
    return Quantized(weights, sum(whole) - sum(map(size_of, weights)), max(whole))


def quantizable(body: Body) -> Iterator[Tensor]:
    """The weights of linear layers, but for the output head and what is fresh."""
    model = body.model
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        fresh = any(name == head or name.startswith(f"{head}.") for head in body.head)
        if isinstance(module, nn.Linear) and module is not output and not fresh:
            yield module.weight
