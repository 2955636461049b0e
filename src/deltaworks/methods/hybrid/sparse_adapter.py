"""SparseAdapter: prune the weights of an adapter itself, once and before training, to be smaller or wider at one size.

Paper: SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters, He et al., 2022,
arXiv:2210.04284 (Findings of EMNLP).

Formula: the adapter with M * theta for theta, M in {0, 1}: of the N entries of all its matrices together the
N - floor((1 - keep) N) with the largest score stay; snip: |g theta| with g the gradient summed over batches;
magnitude: |theta|; random: N(0, 1). M never changes. Large-Sparse: c times the width at keep = 1 / c.
Count: N - floor((1 - keep) N) and what stays whole: biases, and matrices that no checkpoint holds, as of the MLP
behind a prefix (RoBERTa-base, Houlsby m = 64, keep = 1: 2,379,264).
Departure: the published option `sparsity` means what is kept, and its comparison drops all of equal scores; here
exactly the count stays, and only its values exist, stored with their positions (5 to 6 bytes). GraSP and SynFlow,
which need second derivatives or inputs of ones, are left out. snip cannot tell the entries of one matrix apart where
the other one starts at zero.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.calibration import summed_gradients
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, configure, method, option
from deltaworks.core.sites import stable_hash
from deltaworks.methods.hybrid.pruned import Kept, keep, make_prunable, matrices
from deltaworks.methods.selective.entries import largest


class SparseProcedure(Procedure):
    """Prunes all tuners of an adapter when training begins."""

    def __init__(self, delta: Any, config: "SparseAdapter") -> None:
        super().__init__(delta)
        self.config = config
        self.items = [i for i in delta.attached if i.tuner.config is not None and not isinstance(i.tuner, Replacement)]
        if not self.items:
            raise UserError("sparse-adapter prunes other methods: name one, as in sparse-adapter[adapter=lora]")
        for member in delta.members:
            if type(member).procedure is not Config.procedure and not isinstance(member, SparseAdapter):
                raise UserError(
                    f"{member.name} changes its own weights while it trains: sparse-adapter cannot prune it"
                )
        if not make_prunable(item.tuner for item in self.items):
            names = "+".join(member.name for member in delta.members if not isinstance(member, SparseAdapter))
            raise UserError(f"{names} trains no matrices, so sparse-adapter has nothing to prune: name another adapter")

    @property
    def kept(self) -> dict[str, Kept]:
        """What is kept, by name; shared matrices once."""
        found = {
            id(m): (f"{i.key}.{n}", m) for i in self.items for n, m in i.tuner.named_modules() if isinstance(m, Kept)
        }
        return {name.replace("kept.", ""): kept for name, kept in found.values()}

    def begin(self, run: Run) -> None:
        if self.kept or self.config.keep == 1:
            return  # loaded with its mask, or nothing to prune
        found = ((module, name, p) for item in self.items for _, module, name, p in matrices(item.tuner))
        places = {(id(module), name): (module, name, p) for module, name, p in found}.values()
        whole = list({id(parameter): parameter for *_, parameter in places}.values())
        total = sum(parameter.numel() for parameter in whole)
        scores = torch.cat([score.flatten() for score in self.scores(whole, run)])
        mask = torch.zeros_like(scores).index_fill(0, largest(scores, total - int((1 - self.config.keep) * total)), 1.0)
        made = {}
        for parameter, part in zip(whole, mask.split([parameter.numel() for parameter in whole]), strict=True):
            index = part.to(parameter.device).nonzero().flatten()
            made[id(parameter)] = Kept(index, parameter.detach().flatten()[index].clone(), parameter.shape)
        for module, name, parameter in places:
            keep(module, name, made[id(parameter)])
        self.delta.reshaped()

    def scores(self, whole: list[nn.Parameter], run: Run) -> list[Tensor]:
        """The scores of each matrix, on the device of the first one."""
        if self.config.score == "random":
            draw = torch.Generator().manual_seed(stable_hash(f"{self.delta.seed}/sparse-adapter"))
            return [torch.randn(parameter.shape, generator=draw) for parameter in whole]
        if self.config.score == "magnitude":
            found = [parameter.detach().abs() for parameter in whole]
        else:
            gradients, _ = summed_gradients(self.delta.model, whole, run, self.config.batches)
            found = [(g * parameter.detach()).abs() for g, parameter in zip(gradients, whole, strict=True)]
        return [score.to(whole[0].device) for score in found]

    def details(self) -> dict[str, Any]:
        kept = {name: each.values.numel() for name, each in self.kept.items()}
        return {"sparse_adapter_kept": sum(kept.values()), "sparse_adapter_entries": kept}


@method(
    "sparse-adapter",
    family="hybrid",
    paper="He et al., 2022, arXiv:2210.04284",
    identity=False,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "the entries of each adapter are others, so that switching compiles again"},
)
class SparseAdapter(Config):
    targets: str = option("", "unused: the adapter has its own")
    adapter: str | None = option("houlsby[init=normal]", "what is pruned; none: all that this is composed with by '+'")
    keep: float = option(0.6, "share of the entries that stay (the paper: 0.2 to 0.6)", least=0, most=1)
    score: str = option("snip", "what ranks the entries", choices=("snip", "magnitude", "random"))
    batches: int = option(100, "batches whose gradients snip sums; the paper: one pass over the data", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts()  # an unknown adapter is an error at once

    def parts(self) -> list[Config]:
        if self.adapter is None:
            return [self]
        return [*configure(self.adapter).parts(), type(self)(**self.options() | {"adapter": None})]

    def places(self, anatomy: Any) -> list[Any]:
        return []

    def procedure(self, delta: Any) -> Procedure:
        return SparseProcedure(delta, self)
