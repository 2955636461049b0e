"""Light-PEFT: a short estimation, then heads, neurons, modules and ranks that matter least are cut for good.

Paper: Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning, Gu et al., 2024, arXiv:2406.03792.

Formula: for the first E steps masks m_A [heads] of each attention and m_F [neurons] of each feed-forward layer, 1 at
first, multiply what its last matrix reads and train with the adapter: L + lambda (sum |m_A|_1 + sum |m_F|_1). Of the
last E/2 steps: s_M = mean over tokens of ||change of the output|| / ||output before||, and s_k = |mean(A_k * dL/dA_k)|
+ |mean(B_k * dL/dB_k)| of rank k, A_k [in], B_k [out]. Kept is what lies above a quantile: heads of each layer, neurons
over all layers, modules over all, ranks over all of the kept modules. Then the masks go and training begins.
Count: for each kept module the kept ranks times (in + out) that are left.
Departure: where nothing lies above the quantile the largest stays, since a layer without heads is none; a ratio of 0
removes nothing; with grouped queries a mask is one key/value group. The published code keeps lists, here sums.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.cutting import Cut, check_sliceable, ranked, shrink
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.layers import observed
from deltaworks.core.places import LINEAR
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import OnTop, method, option
from deltaworks.core.units import heads, neurons
from deltaworks.methods.procedures.importance import above, masked, module_score, penalty, rank_scores


class LightProcedure(Procedure):
    """Estimates and cuts in ``begin``; a checkpoint of the cut adapter goes on without."""

    def __init__(self, delta: Delta, config: "LightPEFT") -> None:
        super().__init__(delta)
        self.config = config
        self.units = heads(delta.model, delta.anatomy) if config.heads else []
        self.units += neurons(delta.model, delta.anatomy) if config.neurons else []
        check_sliceable(delta, self.units)
        kinds = (*LINEAR, "sublayer")
        mine = [item for item in delta.attached if item.member < len(delta.members) and item.place.kind in kinds]
        self.modules = [item for item in mine if ranked(item.tuner)]
        if not self.modules:
            raise UserError(f"{config} finds no low-rank products or bottlenecks below it: stand on lora or houlsby")
        trunks = {place.stack: place.path for place in delta.anatomy.places if place.kind == "trunk"}
        self.tokens = {stack: delta.watch(path, "mask", graded=True) for stack, path in trunks.items()}
        self.seen: dict[int, tuple[Any, int]] = {}  # sum of s_M and how many, by the tuner
        self.ranks: dict[int, Tensor] = {}  # s_k sums

    def see(self, tuner: Any, before: Tensor, change: Tensor) -> None:
        place = tuner.place
        read = place.role in ("cross_attention.k", "cross_attention.v") and "encoder" in self.tokens
        tap = self.tokens.get("encoder" if read else place.stack)
        score = module_score(before, change, None if tap is None else tap.value)
        total, count = self.seen.get(id(tuner), (0.0, 0))
        self.seen[id(tuner)] = (total + score, count + 1)

    def begin(self, run: Run) -> None:
        if self.delta.cut is None:
            self.cut(self.estimate(run))

    def estimate(self, run: Run) -> list[Tensor]:
        """Train the adapter with masks and note the scores; returns the masks."""
        if run.loss is None or next(iter(run.batches), None) is None:
            raise UserError("light-peft trains before it cuts: it needs Run(batches=..., loss=...) in procedure.begin")
        model, share, config = self.delta.model, self.config.estimate, self.config
        steps = max(2, round(share if share >= 1 else share * run.steps))
        devices = [next(model.get_submodule(each.name).parameters()).device for each in self.units]
        counts = [each.count for each in self.units]
        masks = [nn.Parameter(torch.ones(n, device=device)) for n, device in zip(counts, devices, strict=True)]
        groups = [*self.delta.parameter_groups(config.rate), {"params": masks, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.rate)
        endless = itertools.chain.from_iterable(itertools.repeat(run.batches))
        for step, batch in enumerate(itertools.islice(endless, steps)):
            late = step >= steps // 2
            with masked(model, self.units, masks), observed([i.tuner for i in self.modules if late], self.see):
                loss = run.loss(model, batch)
                (loss + penalty(masks, config.weight).to(loss.device) if masks else loss).backward()
            for item in self.modules if late else ():
                self.ranks[id(item.tuner)] = self.ranks.get(id(item.tuner), 0) + rank_scores(item.tuner)
            optimizer.step()
            optimizer.zero_grad()
        return [mask.detach().cpu() for mask in masks]

    def cut(self, masks: list[Tensor]) -> None:
        """Cut heads, neurons, modules and ranks by what was noted."""
        of = dict(zip((each.name for each in self.units), masks, strict=True))
        layers = [each for each in self.units if each.what == "neurons"]
        kept = {each.name: above(of[each.name], self.config.heads) for each in self.units if each not in layers}
        if layers:
            every = above(torch.cat([of[each.name] for each in layers]), self.config.neurons)
            parts = every.split([each.count for each in layers])
            kept |= {
                u.name: part if part.any() else above(of[u.name], 1.0) for u, part in zip(layers, parts, strict=True)
            }
        removed = {name: (~stays).nonzero().flatten() for name, stays in kept.items()}
        seen = [self.seen.get(id(item.tuner), (0.0, 1)) for item in self.modules]
        strong = above(torch.tensor([float(total) / count for total, count in seen]), self.config.modules)
        stays = [item for item, keep in zip(self.modules, strong, strict=True) if keep]
        ranks = [self.ranks[id(item.tuner)].cpu() for item in stays]
        best = above(torch.cat(ranks), self.config.ranks).split([len(scores) for scores in ranks])
        left = {item.key: part.nonzero().flatten() for item, part in zip(stays, best, strict=True)}
        nothing = torch.empty(0, dtype=torch.long)
        kept_ranks = {item.key: left.get(item.key, nothing) for item in self.modules}
        shrink(self.delta, Cut(self.delta.model, self.units, removed), kept_ranks)

    def details(self) -> dict[str, Any]:
        cut, ranks = self.delta.cut, {key: rank for key, rank in self.delta.ranks.items() if rank}
        left = {each: cut.count(each.name) for each in self.units} if cut is not None else {}
        by_name = {what: {e.name: n for e, n in left.items() if e.what == what} for what in ("heads", "neurons")}
        numbers = {**by_name, "modules": len(ranks), "rank": ranks}
        return {f"light_peft_{name}": value for name, value in numbers.items()}


@method(
    "light-peft",
    family="procedures",
    paper="Gu et al., 2024, arXiv:2406.03792",
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
    limits={
        "rows": "it cuts the base to its own size, so that no other row can share it",
        "compile": "it cuts the base to its own size, so that switching compiles again",
        "quantized": "a quantized weight cannot be cut: leave heads and neurons whole with heads=0 and neurons=0",
    },
    small={"estimate": 6},
)
class LightPEFT(OnTop):
    estimate: float = option(0.2, "E, steps of the estimation; below 1 a share of the run", least=0)
    rate: float = option(3e-4, "learning rate of the estimation", least=0)
    weight: float = option(1e-4, "lambda, the weight of the masks' L1 norm", least=0)
    heads: float = option(1 / 3, "share of the heads of each attention that goes; 0 leaves them whole", least=0, most=1)
    neurons: float = option(1 / 3, "share of all neurons that goes; 0 leaves them whole", least=0, most=1)
    modules: float = option(0.75, "share of the modules of the method below that goes", least=0, most=1)
    ranks: float = option(0.5, "share of the ranks of the kept modules that goes", least=0, most=1)

    def procedure(self, delta: Delta) -> Procedure:
        return LightProcedure(delta, self)
