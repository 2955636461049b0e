"""Rotations of the slices of an input: what OFT and BOFT have in common."""

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.sites import Site


def cayley(Q: Tensor) -> Tensor:
    """The rotations (I - Q)(I + Q)^-1 of skew-symmetric Q [..., b, b]; the two factors commute."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q, eye - Q)


def turned(x: Tensor, R: Tensor) -> Tensor:
    """``x_i R_i`` for every slice x_i of x [..., g b], with R [g, b, b] or one for all [1, b, b]."""
    # one product for each slice; a broadcast ``@`` would copy R for every row of x
    return torch.einsum("...gi,gij->...gj", x.unflatten(-1, (-1, R.shape[-1])), R).flatten(-2)


def block_size(method: str, site: Site, block: int | None, blocks: int | None, usual: int, factors: int = 1) -> int:
    """The side b of the blocks that cut the inputs of a site.

    It is the divisor of the inputs that is nearest to ``block``, to inputs / ``blocks`` or to ``usual``, of two the
    smaller one; with several butterfly ``factors`` it must be even and in / b a multiple of 2^(factors - 1). Raises
    UserError where there is none.
    """
    if block is not None and blocks is not None:
        raise UserError(f"{method}: block and blocks say the same thing: leave one of them out")
    inner, groups = site.shape[1], 2 ** (factors - 1)
    wanted = inner / blocks if blocks is not None else block or usual
    fitting = [
        b for b in range(2, inner + 1) if inner % b == 0 and (factors == 1 or (b % 2, inner // b % groups) == (0, 0))
    ]
    if not fitting:
        cause = "" if factors == 1 else f" for {factors} butterfly factors"
        raise UserError(f"{method}: the {inner} inputs of {site.place.path!r} cannot be cut into blocks{cause}")
    return min(fitting, key=lambda b: abs(b - wanted))
