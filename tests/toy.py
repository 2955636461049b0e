"""A two-block transformer of any width, pre-norm, for examples that are computed by hand."""

import torch
import zoo
from torch import Tensor, nn


class Toy(nn.Module):
    """Blocks of ``zoo.PlainBlock`` and a final norm. Shapes: [batch, length, width] in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(zoo.PlainBlock(width, 2 * width) for _ in range(2))
        self.final = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.final(x)
