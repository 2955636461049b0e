"""MiSS (once Bone, DiSHA) and Bat: one small block for each weight, used again for every slice of the input.

Paper: Bone: Block-Affine Adaptation of Large Language Models, later MiSS: Revisiting the Trade-off in LoRA with an
Efficient Shard-Sharing Structure, Kang and Yin, 2024, arXiv:2409.15371.

Formula: MiSS: y = W x + b + D^T S with D [r, out], S [r] the sum of the slices of x, each r wide, the last one padded
with zeros; so W'[o, j] = W[o, j] + D[j mod r, o], without alpha. Mini: D [r, m] is repeated along the outputs.
Of outputs: D [r, in], W' = W + D[o r // out, j], row i shared by out / r neighbouring outputs (the first MiSS).
Bat: W is cut into blocks W_ab [r, r], a along the outputs and b along the inputs; W'_ab = W_ab + W_ab D_a + D_a with
D [out / r, r, r], or D_b with D [in / r, r, r]. It is the Bone of the paper's versions 1 to 3.
Count: MiSS r out for each weight, mini r m, of outputs r in; Bat r out, or r in.
Departure: the published mini must divide out and the first MiSS may cut shards of any sizes; here all are as equal as
they can be.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class MiSSTuner(Tuner):
    """``block`` [r, m], D of the inputs' slices; it is repeated along the outputs up to [r, out]."""

    def __init__(self, site: Site, config: "MiSS") -> None:
        super().__init__()
        self.out, self.inner = site.shape
        check_block(config.rank, self.inner, "inputs", site)
        width = self.out if config.width is None else config.width
        check_block(width, self.out, "outputs", site)
        self.block, self.dropout = site.zeros(config.rank, width), config.dropout

    def repeated(self) -> Tensor:
        """D [r, out]."""
        width = self.block.shape[1]
        return self.block if width == self.out else self.block.repeat(1, -(-self.out // width))[:, : self.out]

    def factors(self) -> Factors:
        """A [r, in] sums the slices."""
        place = torch.arange(self.inner, device=self.block.device) % len(self.block)
        return Factors(F.one_hot(place, len(self.block)).T.to(self.block.dtype), self.repeated().T)


class LinearMiSSTuner(MiSSTuner):
    """The same where the operation is a matrix product: the slices are summed, not multiplied."""

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        rank, y = len(self.block), base(x)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        slices = F.pad(dropped, (0, -self.inner % rank)).unflatten(-1, (-1, rank)).sum(-2)  # [..., r]
        return y + (slices @ self.repeated().to(x.dtype)).to(y.dtype)


class OutputMiSSTuner(Tuner):
    """``block`` [r, in]: each row is the change of out / r neighbouring outputs."""

    def __init__(self, site: Site, config: "MiSS") -> None:
        super().__init__()
        self.out, inner = site.shape
        check_block(config.rank, self.out, "outputs", site)
        self.block, self.dropout = site.zeros(config.rank, inner), config.dropout

    def factors(self) -> Factors:
        """B [out, r] hands each row to its outputs."""
        place = torch.arange(self.out, device=self.block.device) * len(self.block) // self.out
        return Factors(self.block, F.one_hot(place, len(self.block)).to(self.block.dtype))


class BatTuner(Tuner):
    """``blocks`` [out / r, r, r] or [in / r, r, r], D; the change depends on the weight that it finds."""

    adds = False

    def __init__(self, site: Site, config: "Bat") -> None:
        super().__init__()
        rank, (out, inner) = config.rank, site.shape
        if out % rank or inner % rank:
            raise UserError(f"bat: rank {rank} does not divide the sizes of {site.place.path!r} ({out} x {inner})")
        self.inputs = config.blocks == "inputs"
        self.blocks = site.zeros((inner if self.inputs else out) // rank, rank, rank)

    def weight(self, weight: Tensor) -> Tensor:
        blocks, rank = self.blocks.to(weight.dtype), self.blocks.shape[1]
        blocks = blocks if self.inputs else blocks[:, None]  # [out / r or 1, in / r or 1, r, r]
        cut = weight.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).transpose(1, 2)  # [out / r, in / r, r, r]
        return (cut + cut @ blocks + blocks).transpose(1, 2).reshape(weight.shape)


def check_block(size: int, most: int, what: str, site: Site) -> None:
    """Raises UserError where a block is larger than the weight."""
    if size > most:
        raise UserError(
            f"a block of {size} is larger than {site.place.path!r} allows with its {most} {what}: "
            f"use at most {most}, or other targets"
        )


@method(
    "miss",
    family="reparametrized/block",
    paper="Kang and Yin, 2024, arXiv:2409.15371",
    kinds=("linear", "conv1d", "conv2d"),
    learning_rate=1e-3,
    tried=(3e-4, 1e-3, 3e-3),
    small={"rank": 8},
)
class MiSS(Config):
    targets: str = option("linear", "the paper: every linear layer of the blocks")
    rank: int = option(64, "width r of a slice of the inputs; 64 costs what LoRA of rank 36 does", least=1)
    width: int | None = option(
        None, "columns m of a D that is repeated along the outputs (mini); default: out", least=1
    )
    blocks: str = option(
        "inputs", "what shares D: slices of the inputs or of the outputs", choices=("inputs", "outputs")
    )
    dropout: float = option(0.0, "dropout on the input before it is summed", least=0, most=0.99)

    def tuner(self, site: Site) -> Tuner:
        if self.blocks == "outputs":
            if self.width is not None:
                raise UserError("miss: width repeats a D of the inputs: leave it out, or blocks=outputs")
            return OutputMiSSTuner(site, self)
        return (LinearMiSSTuner if site.place.kind in ("linear", "conv1d") else MiSSTuner)(site, self)


@method(
    "bat",
    family="reparametrized/block",
    paper="Kang and Yin, 2024, arXiv:2409.15371",
    kinds=("linear", "conv1d"),
    tuner=BatTuner,
    learning_rate=3e-3,
    tried=(3e-4, 1e-3, 3e-3),
    small={"rank": 4},
)
class Bat(Config):
    targets: str = option("linear", "the paper: every linear layer of the blocks")
    rank: int = option(64, "side r of a block, a divisor of both sizes of the weight", least=1)
    blocks: str = option("outputs", "which blocks have a D of their own", choices=("inputs", "outputs"))
