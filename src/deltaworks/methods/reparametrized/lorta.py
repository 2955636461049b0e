"""LoRTA: the changes of all attention matrices are one tensor of fifth order with a CP decomposition of rank r.

Paper: LoRTA: Low Rank Tensor Adaptation of Large Language Models, Hounie et al., 2024, arXiv:2410.04060.

Formula: T[i, j, h, l, m] = sum_t A[i, t] B[t, j] C_h[h, t] C_l[l, t] C_m[m, t], with A [d, r] over the residual
stream, B [r, d_h] over the features of a head, C_h [H, r] over heads, C_l [L, r] over blocks, C_m [M, r] over roles
(q, k, v, o: M = 4). D of block l and role m is [d, H d_h], its heads side by side. W' = W + s D^T for q, k and v,
whose outputs are heads; W' = W + s D for o, whose inputs are; s = alpha / r. Each is a product of rank r, so D is
never formed. Matrices with fewer heads (grouped keys and values) take the first rows of C_h.
Start: A ~ U(+-1/sqrt(r)), C ~ U(+-sqrt(6 / (r (1 + 5 slope^2)))), B = 0.
Count: r (d + d_h + H + L + M), once for each pair (d, d_h) that the targets have.
Departure: the published packages lay out all four matrices one way (``layout`` "inputs" for GLUE, "outputs" for
instructions) and know no grouped keys; the default turns o alone. Other targets are cut into heads in the same way.
"""

from functools import partial
from typing import NamedTuple

from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.places import Place
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class Cut(NamedTuple):
    """How one matrix lies in the tensor: d, d_h and H of its sides, and whether its heads are its outputs."""

    width: int
    head: int
    heads: int
    turned: bool


class CP(nn.Module):
    """The factors of all matrices ``places`` with the same d and d_h: five tensors."""

    def __init__(self, site: Site, config: "LoRTA", cuts: dict[Place, Cut]) -> None:
        super().__init__()
        self.blocks = list(dict.fromkeys((place.stack, place.block) for place in cuts))
        self.roles = list(dict.fromkeys(place.role for place in cuts))
        rank, (width, head, *_) = config.rank, next(iter(cuts.values()))
        uniform = partial(site.uniform, bound=(6 / (rank * (1 + 5 * config.slope**2))) ** 0.5)
        self.A, self.B = site.kaiming(width, rank), site.zeros(rank, head)
        self.C_h = uniform(max(cut.heads for cut in cuts.values()), rank)
        self.C_l, self.C_m = uniform(len(self.blocks), rank), uniform(len(self.roles), rank)


class LoRTATuner(Tuner):
    """One matrix of the tensor: row l of C_l, row m of C_m, the first H rows of C_h."""

    def __init__(self, site: Site, config: "LoRTA") -> None:
        super().__init__()
        cuts: dict[Place, Cut] = site.shared(
            ("lorta", site.member), lambda: {place: config.cut(site.at(place)) for place in config.places(site.anatomy)}
        )
        self.cut = cuts[site.place]
        same = {place: cut for place, cut in cuts.items() if cut[:2] == self.cut[:2]}
        self.cp: CP = site.shared(("lorta", site.member, *self.cut[:2]), lambda: CP(site, config, same))
        self.block = self.cp.blocks.index((site.place.stack, site.place.block))
        self.role = self.cp.roles.index(site.place.role)
        self.scale = config.alpha / config.rank  # type: ignore[operator]
        self.dropout = config.dropout

    def factors(self) -> Factors:
        cp = self.cp
        wide = cp.A * (cp.C_l[self.block] * cp.C_m[self.role])  # [d, r]
        heads = (cp.C_h[: self.cut.heads, None] * cp.B.T).flatten(0, 1)  # [H d_h, r]
        return Factors(wide.T, heads, self.scale) if self.cut.turned else Factors(heads.T, wide, self.scale)


@method(
    "lorta",
    family="reparametrized/tensor",
    paper="Hounie et al., 2024, arXiv:2410.04060",
    kinds=("linear", "conv1d"),
    tuner=LoRTATuner,
    learning_rate=3e-2,
    tried=(3e-3, 1e-2, 3e-2),
    small={"head": 8},
)
class LoRTA(Config):
    targets: str = option("attention.q,attention.k,attention.v,attention.o", "the paper: self-attention")
    rank: int = option(8, "CP rank r; one more costs about d parameters for the whole model", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    slope: float = option(0.0, "negative slope of the Kaiming-uniform C factors, over sqrt(5)", least=0)
    head: int | None = option(None, "features d_h of a head; default: the model's", least=1)
    layout: str = option("own", "which side of a matrix is heads", choices=("own", "inputs", "outputs"))
    dropout: float = option(0.0, "dropout on the input of A", least=0, most=0.99)

    def cut(self, site: Site) -> Cut:
        """How the matrix of a site lies in the tensor. Raises UserError where its sides do not fit."""
        head = self.head or site.heads[1]
        turned = self.layout == "outputs" or (self.layout == "own" and site.place.role.split(".")[-1] not in OUTWARD)
        many, width = site.shape if turned else site.shape[::-1]
        if many % head:
            raise UserError(f"lorta: heads of {head} features do not divide {many}, a side of {site.place.path!r}")
        return Cut(width, head, many // head, turned)


OUTWARD = ("o", "down")  # roles that write into the residual stream
