"""What the sparse methods have in common: a few chosen entries of the weights, and the scores that choose them."""

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaworks.core.anatomy import backbone as backbone
from deltaworks.core.building import Attached
from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure
from deltaworks.core.quantized import entries
from deltaworks.core.sites import Site
from deltaworks.core.weights import base_tensors


class Entries(nn.Module):
    """``values`` [k] to be added at the flat positions ``index`` [k] (ascending; int32 where that is enough)."""

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index)

    def current(self, parameter: Tensor) -> Tensor:
        """What the entries of ``parameter`` are now, [k], in float32."""
        return parameter.detach().reshape(-1)[self.index].float() + self.values


class EntriesTuner(Tuner):
    """The chosen entries of one module's parameters, of which there are none at first."""

    decays = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.chosen = nn.ModuleDict()
        base = site.module.named_parameters(recurse=False)
        self.own = {name: (id(tensor), entries(tensor)) for name, tensor in base}
        self.entries: dict[int, Entries] = site.shared("entries", dict)
        self.device = site.device

    def choose(self) -> None:
        """Take what is chosen of this module's parameters; tied parameters share their entries."""
        self.chosen = nn.ModuleDict({n: self.entries[key] for n, (key, _) in self.own.items() if key in self.entries})

    def tensor(self, name: str, base: Tensor) -> Tensor:
        if name not in self.chosen:
            return base
        entries: Any = self.chosen[name]
        return base.reshape(-1).index_add(0, entries.index, entries.values.to(base.dtype)).view(base.shape)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        names = sorted({key.split(".")[1] for key in tensors if key.count(".") == 2})
        if set(tensors) != {f"chosen.{name}.{part}" for name in names for part in ("index", "values")}:
            raise UserError(f"its tensors must be pairs of 'index' and 'values', not {', '.join(sorted(tensors))}")
        for name in names:
            if name not in self.own:
                raise UserError(f"there is no parameter {name!r}")
            key, size = self.own[name]
            index, values = tensors[f"chosen.{name}.index"], tensors[f"chosen.{name}.values"]
            if index.dim() != 1 or index.shape != values.shape or not values.is_floating_point():
                raise UserError(f"'index' and 'values' of {name!r} must be two lists of one length")
            if not ascending(index, size):
                raise UserError(f"'index' of {name!r} must hold ascending positions between 0 and {size - 1}")
            self.entries[key] = Entries(index.to(self.device), values.to(self.device, torch.float32))
        self.choose()


def ascending(index: Tensor, size: int) -> bool:
    """Whether these are ascending positions [k] (int32 or int64) in a list of ``size``."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or bool((index.diff() <= 0).any()):
        return False
    return not len(index) or (int(index[0]) >= 0 and int(index[-1]) < size)


class Choosing(Procedure):
    """Chooses the entries of all weights together, before the first step."""

    delta: Delta
    optimizer: Optimizer | None = None

    def __init__(self, delta: Delta, config: Any) -> None:
        super().__init__(delta)
        self.config = config

    def optimizing(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizer's state of these parameters start again from zero."""
        if self.optimizer is not None:
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)

    def tuners(self) -> list[Any]:
        return [tuner for tuner in self.delta.tuners() if tuner.config is self.config]

    def owners(self) -> dict[int, tuple[Attached, str]]:
        """Where each of the backbone's parameters stands, and its name there, by the key of its entries; ties once."""
        found: dict[int, tuple[Attached, str]] = {}
        for item in self.delta.attached:
            if item.tuner.config is self.config:
                for name, (key, _) in cast(EntriesTuner, item.tuner).own.items():
                    found.setdefault(key, (item, name))
        return found

    def parameters(self) -> dict[int, nn.Parameter]:
        """The backbone's parameters by the key of their entries, tied ones once; of quantized ones the codes."""
        model = self.delta.model
        return {
            key: cast(nn.Parameter, model.get_submodule(item.place.path)._parameters[name])
            for key, (item, name) in self.owners().items()
        }

    def values(self, key: int) -> Tensor:
        """What one of ``parameters()`` stands for, as a plain tensor."""
        item, name = self.owners()[key]
        return cast(Tensor, base_tensors(self.delta.model.get_submodule(item.place.path))[name]).detach()

    @property
    def chosen(self) -> bool:
        return any(len(tuner.chosen) for tuner in self.tuners())

    @property
    def count(self) -> int:
        """The number k of entries to keep."""
        return int(self.config.keep * sum(map(entries, self.parameters().values())))

    def choose(self, scores: list[Tensor]) -> None:
        """Train the ``count`` entries with the largest scores; one tensor of scores for each of ``parameters()``."""
        kept = largest(torch.cat([score.flatten() for score in scores]), self.count)
        ends = [0, *accumulate(score.numel() for score in scores)]
        cuts = torch.searchsorted(kept, torch.tensor(ends, device=kept.device)).tolist()
        self.take([kept[a:b] - start for (a, b), start in zip(pairwise(cuts), ends, strict=False)])

    def take(self, chosen: list[Tensor]) -> None:
        """Train the flat positions ``chosen`` (ascending), one list for each of ``parameters()``."""
        shared = self.tuners()[0].entries
        for (key, parameter), index in zip(self.parameters().items(), chosen, strict=True):
            if len(index):
                shared[key] = Entries(narrowed(index, entries(parameter)), torch.zeros(len(index), device=index.device))
        for tuner in self.tuners():
            tuner.choose()
        self.delta.reshaped()

    def kept(self) -> dict[str, int]:
        """How many entries of which tensor are trained; of tied tensors the first one is named."""
        shared = self.tuners()[0].entries
        return {f"{i.key}.{name}": len(shared[key].index) for key, (i, name) in self.owners().items() if key in shared}

    def details(self) -> dict[str, Any]:
        prefix, kept = self.config.name.replace("-", "_"), self.kept()
        return {f"{prefix}_kept": sum(kept.values()), f"{prefix}_entries": kept}

    def loss(self, loss: Tensor) -> Tensor:
        if not self.chosen:
            name = self.config.name
            raise UserError(f"{name} has not chosen what to train: call procedure.begin(run) before the first step")
        return loss


def narrowed(index: Tensor, size: int) -> Tensor:
    """Positions in a tensor of ``size`` entries as int32 where that is enough."""
    return index.to(torch.int32 if size < 2**31 else torch.int64)


def below(values: Tensor, threshold: float) -> Tensor:
    """The flat positions of absolute values below a threshold; on the meta device, which has no values, none."""
    try:
        return (values.float().abs() < threshold).flatten().nonzero().flatten()
    except NotImplementedError:
        return torch.empty(0, dtype=torch.long, device=values.device)


def largest(scores: Tensor, count: int) -> Tensor:
    """The positions of exactly ``count`` largest scores, ascending; of equal scores the first ones."""
    if count < 1:
        raise UserError(f"none of {scores.numel()} parameters would be kept: raise keep")
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    equal = (scores == threshold).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values
