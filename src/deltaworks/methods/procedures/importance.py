"""What of a model and its adapter matters: masks on heads and neurons, scores of whole modules and of single ranks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.cutting import INNER
from deltaworks.core.units import Units


def penalty(masks: list[nn.Parameter], weight: float) -> Tensor:
    """lambda times the sum of all |m|."""
    return weight * torch.stack([mask.abs().sum().to(masks[0].device) for mask in masks]).sum()


def above(values: Tensor, share: float) -> Tensor:
    """Which values stay when the ``share`` of the smallest goes: those above the quantile, or else the largest."""
    if not share:
        return torch.ones_like(values, dtype=torch.bool)
    wide = values.double().cpu()
    kept = wide > torch.quantile(wide, share)
    return kept if bool(kept.any()) else torch.zeros_like(kept).index_fill(0, wide.argmax(), True)


@torch.no_grad()
def rank_scores(tuner: Any) -> Tensor:
    """|mean(w_k * dL/dw_k)| of each rank k, [r]: summed over the two matrices."""
    pairs = [(getattr(tuner, name), dim) for name, dim in INNER.items() if name in tuner._parameters and name != "b_D"]
    means = [(w * (0 if w.grad is None else w.grad)).mean(1 - dim).abs() for w, dim in pairs]
    return torch.stack(means).sum(0).nan_to_num(0, 0, 0)


def module_score(before: Tensor, change: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens that are no padding of the ratio of the norms; ``mask`` [batch, T]."""
    ratio = torch.linalg.vector_norm(change.float(), dim=-1) / torch.linalg.vector_norm(before.float(), dim=-1)
    if mask is not None and mask.shape == ratio.shape:  # with virtual tokens among them, all tokens count
        ratio = ratio[mask.to(ratio.device).bool()]
    return ratio.mean().nan_to_num(0, 0, 0)


@contextmanager
def masked(model: nn.Module, units: list[Units], masks: list[nn.Parameter]) -> Iterator[None]:
    """The model with each mask on what the last matrix of its sub-layer reads."""

    def hook(each: Units, mask: nn.Parameter) -> Any:
        return lambda _, args: (args[0] * mask.repeat_interleave(each.size).to(args[0].dtype), *args[1:])

    with ExitStack() as stack:
        for each, mask in zip(units, masks, strict=True):
            made = model.get_submodule(each.name).register_forward_pre_hook(hook(each, mask))
            stack.callback(made.remove)
        yield
