"""What prefixes do beside standing in front of the keys: attention of their own, and the place of the text."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.forms import Heads, Tokens, Tuner


class Shift(Tuner):
    """Moves the text of one trunk back by l positions."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def around(self, base: Callable[[Tokens], Tensor], tokens: Tokens) -> Tensor:
        return base(tokens._replace(behind=tokens.behind + self.length))


def attended(heads: Heads, key: Tensor, value: Tensor) -> Tensor:
    """Attention to the prefix alone, [batch, length, heads, head_dim]."""
    query, others = heads.query[..., : key.shape[-1]], heads.query.shape[-1] - key.shape[-1]
    shared = query.shape[1] // key.shape[0]  # query heads of one key head
    key, value = (part.to(query.dtype).repeat_interleave(shared, 0) for part in (key, value))
    output = torch.softmax(heads.scaling * query @ key.mT, dim=-1) @ value
    return F.pad(output.transpose(1, 2), (0, others))
