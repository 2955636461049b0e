"""What the sparse methods have in common: a few chosen entries of the weights, and the scores that choose them."""

from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.sites import Site


class Entries(nn.Module):
    """``values`` [k] to be added at the flat positions ``index`` [k] (ascending; int32 where that is enough)."""

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index)


class EntriesTuner(Tuner):
    """The chosen entries of one module's parameters, of which there are none at first."""

    decays = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.chosen = nn.ModuleDict()
        base = site.module.named_parameters(recurse=False)
        self.own = {name: (id(tensor), tensor.numel()) for name, tensor in base if tensor.is_floating_point()}
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
            if index.is_floating_point() or bool((index.diff() <= 0).any()) or not _within(index, size):
                raise UserError(f"'index' of {name!r} must hold ascending positions between 0 and {size - 1}")
            self.entries[key] = Entries(index.to(self.device), values.to(self.device, torch.float32))
        self.choose()


def _within(index: Tensor, size: int) -> bool:
    return not index.numel() or (int(index[0]) >= 0 and int(index[-1]) < size)


class Choosing(Procedure):
    """Chooses the entries of all weights together, before the first step."""

    delta: Delta

    def __init__(self, delta: Delta, config: Any) -> None:
        super().__init__(delta)
        self.config = config

    def tuners(self) -> list[Any]:
        return [tuner for tuner in self.delta.tuners() if tuner.config is self.config]

    def parameters(self) -> dict[int, nn.Parameter]:
        """The backbone's parameters by the key of their entries, tied ones once."""
        found: dict[int, Any] = {}
        for item in self.delta.attached:
            if item.tuner.config is self.config:
                base, tuner = (
                    self.delta.model.get_submodule(item.place.path)._parameters,
                    cast(EntriesTuner, item.tuner),
                )
                found |= {key: base[name] for name, (key, _) in tuner.own.items()}
        return found

    @property
    def chosen(self) -> bool:
        return any(len(tuner.chosen) for tuner in self.tuners())

    @property
    def count(self) -> int:
        """The number k of entries to keep."""
        return int(self.config.keep * sum(parameter.numel() for parameter in self.parameters().values()))

    def choose(self, scores: list[Tensor]) -> None:
        """Train the ``count`` entries with the largest scores; one tensor of scores for each of ``parameters()``."""
        kept = largest(torch.cat([score.flatten() for score in scores]), self.count)
        shared, start = self.tuners()[0].entries, 0
        for key, parameter in self.parameters().items():
            index = kept[(kept >= start) & (kept < start + parameter.numel())] - start
            start += parameter.numel()
            if len(index):
                narrow = torch.int32 if parameter.numel() < 2**31 else torch.int64
                shared[key] = Entries(index.to(narrow), torch.zeros(len(index), device=index.device))
        for tuner in self.tuners():
            tuner.choose()
        self.delta.reshaped()

    def loss(self, loss: Tensor) -> Tensor:
        if not self.chosen:
            name = self.config.name
            raise UserError(f"{name} has not chosen what to train: call procedure.begin(run) before the first step")
        return loss


def squared_gradients(
    model: nn.Module, parameters: list[nn.Parameter], run: Run, samples: int
) -> tuple[list[Tensor], int]:
    """The mean squared gradient of each parameter over at most ``samples`` single examples, and their number.

    Float32, with dropout off. Raises UserError where the run has no examples to give.
    """
    if run.loss is None or run.one_by_one is None:
        raise UserError("ranking weights needs Run(loss=..., one_by_one=...) in procedure.begin: single examples")
    scores = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter.requires_grad for parameter in parameters]
    seen = 0
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(True)
        for example in islice(run.one_by_one, samples):
            gradients = torch.autograd.grad(run.loss(model, example), parameters, allow_unused=True)
            for score, gradient in zip(scores, gradients, strict=True):
                if gradient is not None:
                    score.add_(gradient.float().square())
            seen += 1
    finally:
        for parameter, wants in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(wants)
        for module, training in modes.items():
            module.training = training
    if not seen:
        raise UserError("ranking weights needs single examples, and Run(one_by_one=...) yields none")
    return [score / seen for score in scores], seen


def largest(scores: Tensor, count: int) -> Tensor:
    """The positions of exactly ``count`` largest scores, ascending; of equal scores the first ones."""
    if count < 1:
        raise UserError(f"none of {scores.numel()} parameters would be kept: raise keep")
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    equal = (scores == threshold).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values


def backbone(anatomy: Any, places: list[Any]) -> list[Any]:
    """The places without the output head's own; a head that is tied to an embedding moves with it."""
    own = {f"{place.path}." for place in places if place.role != "head"}
    tied = {
        name.rpartition(".")[0]
        for group in anatomy.tied
        if any(name.rpartition(".")[0] + "." in own for name in group)
        for name in group
    }
    return [place for place in places if place.part is None and (place.role != "head" or place.path in tied)]
