"""FISH Mask: train the few entries of all weights that carry the most Fisher information.

Paper: Training Neural Networks with Fixed Sparse Masks, Sung, Nair and Raffel, 2021, arXiv:2111.09839 (NeurIPS).

Formula: F_i = (1/N) sum over N examples of (d log p(y|x) / d w_i)^2, with the true labels (the empirical Fisher
information, their section 3.2); w' = w + v at the k entries with the largest F, ties by position; v [k] trained.
Count: k = floor(keep * N) of the N backbone parameters, tied ones counted once and the head left out.
Departure: the published code masks dense gradients; here only the k values exist, so that the optimizer's state is
2 k numbers and weight decay cannot reach what is masked. Dropout is off in the pass over the examples.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class Entries(nn.Module):
    """``values`` [k] to be added at the flat positions ``index`` [k] (ascending; int32 where that is enough)."""

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index)


class FishTuner(Tuner):
    """The chosen entries of one module's parameters; none, before the pass over the examples."""

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


class FishProcedure(Procedure):
    """The pass over the examples, then nothing: the mask never changes."""

    delta: Delta
    samples = 0

    def __init__(self, delta: Delta, config: "Fish") -> None:
        super().__init__(delta)
        self.config = config

    def _tuners(self) -> list[Any]:
        return [tuner for tuner in self.delta.tuners() if tuner.config is self.config]

    def _parameters(self) -> dict[int, nn.Parameter]:
        """The backbone's parameters by the key of their entries, tied ones once."""
        found: dict[int, Any] = {}
        for item in self.delta.attached:
            if item.tuner.config is self.config:
                base, tuner = self.delta.model.get_submodule(item.place.path)._parameters, cast(FishTuner, item.tuner)
                found |= {key: base[name] for name, (key, _) in tuner.own.items()}
        return found

    @property
    def count(self) -> int:
        """The number k of entries to keep."""
        return int(self.config.keep * sum(parameter.numel() for parameter in self._parameters().values()))

    def begin(self, run: Run) -> None:
        if any(len(tuner.chosen) for tuner in self._tuners()):
            return  # loaded with its mask
        if run.loss is None or run.one_by_one is None:
            raise UserError("fish needs Run(loss=..., one_by_one=...) in procedure.begin: it ranks single examples")
        parameters = self._parameters()
        scores = self._information(list(parameters.values()), run)
        kept = largest(torch.cat([score.flatten() for score in scores]), self.count)
        shared, start = self._tuners()[0].entries, 0
        for key, parameter in parameters.items():
            index = kept[(kept >= start) & (kept < start + parameter.numel())] - start
            start += parameter.numel()
            if len(index):
                narrow = torch.int32 if parameter.numel() < 2**31 else torch.int64
                shared[key] = Entries(index.to(narrow), torch.zeros(len(index), device=index.device))
        for tuner in self._tuners():
            tuner.choose()
        self.delta.reshaped()

    def _information(self, parameters: list[nn.Parameter], run: Run) -> list[Tensor]:
        """The mean squared gradient of each parameter over single examples, in float32."""
        model = self.delta.model
        scores = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        modes = {module: module.training for module in model.modules()}
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            model.eval()
            for parameter in parameters:
                parameter.requires_grad_(True)
            for example in islice(run.one_by_one, self.config.samples):  # type: ignore[arg-type]
                loss = run.loss(model, example)  # type: ignore[misc]
                for score, gradient in zip(
                    scores, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        score.add_(gradient.float().square())
                self.samples += 1
        finally:
            for parameter, wants in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(wants)
            for module, training in modes.items():
                module.training = training
        if not self.samples:
            raise UserError("fish ranks weights by single examples, and Run(one_by_one=...) yields none")
        return [score / self.samples for score in scores]

    def loss(self, loss: Tensor) -> Tensor:
        if not any(len(tuner.chosen) for tuner in self._tuners()):
            raise UserError("fish has not chosen what to train: call procedure.begin(run) before the first step")
        return loss

    def details(self) -> dict[str, Any]:
        return {"kept": self.count, "fisher_samples": self.samples}


def largest(scores: Tensor, count: int) -> Tensor:
    """The positions of exactly ``count`` largest scores, ascending; of equal scores the first ones."""
    if count < 1:
        raise UserError(f"fish keeps none of {scores.numel()} parameters: raise keep")
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    equal = (scores == threshold).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values


@method(
    "fish",
    family="selective",
    paper="Sung et al., 2021, arXiv:2111.09839",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=FishTuner,
    learning_rate=1e-3,
    limits={"compile": "the entries of each adapter are others, so that switching compiles again"},
    small={"keep": 0.05},
)
class Fish(Config):
    targets: str = option("all", "which weights compete, never the output head's own")
    keep: float = option(0.005, "fraction of the backbone's parameters that are trained", least=0, most=1)
    samples: int = option(1024, "examples that estimate the Fisher information; few are enough", least=1)

    def places(self, anatomy):  # type: ignore[no-untyped-def]
        # a head that is tied to an embedding moves with it
        places = super().places(anatomy)
        backbone = {f"{place.path}." for place in places if place.role != "head"}
        tied = {
            name.rpartition(".")[0]
            for group in anatomy.tied
            if any(name.rpartition(".")[0] + "." in backbone for name in group)
            for name in group
        }
        return [place for place in places if place.part is None and (place.role != "head" or place.path in tied)]

    def tuner(self, site: Site) -> Tuner:
        return FishTuner(site)

    def procedure(self, delta: Delta) -> Procedure:
        return FishProcedure(delta, self)
