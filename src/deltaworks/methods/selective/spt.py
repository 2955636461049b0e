"""SPT: squared gradients decide which weights get a low-rank module and which are tuned entry by entry.

Paper: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, He et al., 2023, arXiv:2303.08566 (ICCV).

Formula: s of an entry is the sum over batches of its squared gradient; the tau entries with the largest s over all
tensors are marked, c of them in one tensor. A weight [out, in] whose module costs q gets the module if c >= q / alpha,
else its marked entries are tuned: w' = w + v; a vector is tuned whole if c >= its length / beta, else its marked
entries. Modules: lora, y = W x + b + U D x, q = r (in + out); adapter, h + U gelu(D h + b_D) + b_U behind the linear,
q = 2 r out + r + out; U and the biases start at zero.
Count: sum of q over the modules, and the entries and vectors that are tuned. Of 79 tau up to twice the budget, the one
whose count is nearest to it is taken, as in the published sweep.
Departure: sensitivities are taken with dropout off; marked entries of norms, which the published code counts and does
not train, are trained; its dropout of 0.1 around the modules is left out. Embeddings stay frozen; the paper trains the
cls token and the head, which is what ``also`` is for.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.calibration import gathered_gradients
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.places import LINEAR
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import Choosing, EntriesTuner
from deltaworks.methods.selective.late import Behind, Beside


class SPTProcedure(Choosing):
    """One pass over some batches, then nothing: what was chosen never changes."""

    def __init__(self, delta: Delta, config: "SPT") -> None:
        super().__init__(delta, config)
        twin = config.half("modules")
        self.modules: dict[str, Any] = {i.place.path: i.tuner for i in delta.attached if i.tuner.config == twin}

    @property
    def chosen(self) -> bool:
        return super().chosen or any("D" in module._parameters for module in self.modules.values())

    def begin(self, run: Run) -> None:
        if self.chosen:
            return  # loaded with what was chosen
        if run.loss is None:
            raise UserError("spt measures gradients: it needs Run(batches=..., loss=...) in procedure.begin")
        batches, parameters = islice(run.batches, self.config.batches), list(self.parameters().values())
        scores, seen = gathered_gradients(self.delta.model, parameters, run.loss, batches, Tensor.square)
        if not seen or not self.count:
            raise UserError("spt needs keep above 0 and Run(batches=...) that yields batches")
        self.allocate(scores)

    def plan(self, marked: list[int]) -> tuple[list[str], int]:
        """What each tensor gets for its number of marked entries ("module", "whole", "entries"), and the count."""
        kinds, total = [], 0
        for (item, name), parameter, c in zip(self.owners().values(), self.parameters().values(), marked, strict=True):
            module = self.modules.get(item.place.path) if name == "weight" and parameter.dim() == 2 else None
            if module is not None and c >= module.cost / self.config.ease:
                kinds.append("module")
                total += module.cost
            elif parameter.dim() < 2 and c >= parameter.numel() / self.config.vector_ease:
                kinds.append("whole")
                total += parameter.numel()
            else:
                kinds.append("entries")
                total += c
        return kinds, total

    def allocate(self, scores: list[Tensor]) -> None:
        """Take the tau whose count is nearest to the budget, and make what it asks for."""
        sizes = torch.tensor([score.numel() for score in scores])
        ends, most = sizes.cumsum(0), min(2 * self.count, int(sizes.sum()))
        order = torch.cat([score.flatten() for score in scores]).topk(most).indices.cpu()
        owner = torch.searchsorted(ends, order, right=True)
        plans = {}
        for tau in sorted({max(1, most * step // 80) for step in range(1, 80)} | {min(self.count, most)}):
            marked = torch.bincount(owner[:tau], minlength=len(scores)).tolist()
            plans[tau] = self.plan(marked)
        tau = min(plans, key=lambda tau: (abs(plans[tau][1] - self.count), tau))
        kinds, _ = plans[tau]
        chosen = []
        for index, (kind, score) in enumerate(zip(kinds, scores, strict=True)):
            start = int(ends[index]) - score.numel()
            mine = (order[:tau][owner[:tau] == index] - start).sort().values
            chosen.append(torch.arange(score.numel()) if kind == "whole" else mine[:0] if kind == "module" else mine)
        for kind, (item, _) in zip(kinds, self.owners().values(), strict=True):
            if kind == "module":
                self.modules[item.place.path].choose()
        self.take([index.to(score.device) for index, score in zip(chosen, scores, strict=True)])

    def details(self) -> dict[str, Any]:
        modules = {path: module.cost for path, module in self.modules.items() if "D" in module._parameters}
        return super().details() | {"spt_module_values": modules}


@method(
    "spt",
    family="selective",
    paper="He et al., 2023, arXiv:2303.08566",
    kinds=("linear", "conv1d"),
    learning_rate=1e-3,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "what each adapter chose is another, so that switching compiles again"},
    small={"keep": 0.05, "rank": 2},
)
class SPT(Config):
    targets: str = option("linear,norm", "what competes; the paper: all but embeddings and head")
    keep: float = option(0.005, "budget, as a fraction of the parameters that compete; 0.4 M of ViT-B", least=0, most=1)
    module: str = option("lora", "what a sensitive weight gets", choices=("lora", "adapter"))
    rank: int = option(8, "r of a module", least=1)
    ease: float = option(10.0, "alpha: a weight gets a module for cost / alpha marked entries", least=0.001)
    vector_ease: float = option(5.0, "beta: a vector is tuned whole for length / beta marked entries", least=0.001)
    batches: int = option(16, "batches that the sensitivity is measured on", least=1)
    part: str = option("both", "its two halves, or entries alone", choices=("both", "entries", "modules"))

    def parts(self) -> list[Config]:
        return [self.half("entries"), self.half("modules")] if self.part == "both" else [self]

    def half(self, part: str) -> "SPT":
        return SPT(**self.options() | {"part": part})

    def places(self, anatomy: Any) -> list[Any]:
        kinds = LINEAR if self.part == "modules" else (*LINEAR, "norm")
        places = anatomy.select(self.targets, (*LINEAR, "norm"))
        return [p for p in places if p.kind in kinds and p.part is None and p.role != "head"]

    def tuner(self, site: Site) -> Tuner:
        if self.part == "entries":
            return EntriesTuner(site)
        return (Beside if self.module == "lora" else Behind)(site, self.rank)

    def procedure(self, delta: Delta) -> Procedure | None:
        if self.part == "entries":
            return SPTProcedure(delta, self)
        if self.half("entries") not in delta.members:
            raise UserError("spt[part=modules] is one half of spt and chooses nothing: leave part out")
        return None
