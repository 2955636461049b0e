"""What procedures learn of a model before the first step: gradients over some of the run's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.merging import plain_meanwhile
from deltaworks.core.procedure import Run

Criterion = Callable[[Any, Any], Tensor]
"""(model, batch) to a scalar whose gradients are looked at."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards (frozen parts may stay in evaluation)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def squared_gradients(
    model: nn.Module, parameters: list[nn.Parameter], run: Run, samples: int
) -> tuple[list[Tensor], int]:
    """The mean squared gradient of each parameter over at most ``samples`` single examples, and their number.

    Float32, with dropout off. Raises UserError where the run has no examples to give.
    """
    if run.loss is None or run.one_by_one is None:
        raise UserError("ranking weights needs Run(loss=..., one_by_one=...) in procedure.begin: single examples")
    scores, seen = gathered_gradients(model, parameters, run.loss, islice(run.one_by_one, samples), Tensor.square)
    if not seen:
        raise UserError("ranking weights needs single examples, and Run(one_by_one=...) yields none")
    return [score / seen for score in scores], seen


def summed_gradients(
    model: nn.Module, parameters: list[nn.Parameter], run: Run, batches: int, criterion: Criterion | None = None
) -> tuple[list[Tensor], int]:
    """The signed sum of each parameter's gradients over at most ``batches`` of the run's, and their number.

    ``criterion`` stands for the training loss, if given. Raises UserError where the run has no batches to give.
    """
    criterion = criterion or run.loss
    if criterion is None:
        raise UserError("the gradients of weights need Run(loss=..., batches=...) in procedure.begin")
    scores, seen = gathered_gradients(model, parameters, criterion, islice(run.batches, batches))
    if not seen:
        raise UserError("the gradients of weights need batches, and Run(batches=...) yields none")
    return scores, seen


def gathered_gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    criterion: Criterion,
    batches: Iterable[Any],
    turned: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> tuple[list[Tensor], int]:
    """The sum of ``turned(gradient)`` for each parameter over ``batches``, in float32, and the number of batches.

    Dropout is off; no parameter changes, and the model is left as it was. Quantized linears are plain ones meanwhile.
    Raises UserError for other weights that hold integers.
    """
    seen = 0
    with evaluating(model), plain_meanwhile(model, parameters) as present:
        if odd := next((parameter.dtype for parameter in present if not parameter.is_floating_point()), None):
            raise UserError(f"the gradients of all weights are needed, and weights in {odd} have none")
        scores = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in present]
        wanted = [parameter.requires_grad for parameter in present]
        try:
            for parameter in present:
                parameter.requires_grad_(True)
            for batch in batches:
                gradients = torch.autograd.grad(criterion(model, batch), present, allow_unused=True)
                for score, gradient in zip(scores, gradients, strict=True):
                    if gradient is not None:
                        score.add_(turned(gradient.float()))
                seen += 1
        finally:
            for parameter, wants in zip(present, wanted, strict=True):
                parameter.requires_grad_(wants)
    return scores, seen
