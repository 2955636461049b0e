"""A training run rehearsed on the meta device: what it holds at its peak, and what a step computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from deltaworks.advise.bodies import Body, batch_for
from deltaworks.advise.kernels import Kernels
from deltaworks.advise.phantom import Phantom
from deltaworks.advise.quantized import Coded
from deltaworks.advise.values import Normal
from deltaworks.core.calibration import evaluating
from deltaworks.core.delta import Delta, attach
from deltaworks.core.forms import Replacement
from deltaworks.core.procedure import Run
from deltaworks.core.quantized import storages
from deltaworks.core.registry import Config
from deltaworks.train import measure
from deltaworks.train.checkpointing import checkpointed

STEPS = 3  # the second is the first with an optimizer's state; methods that turn half-way do it at the third at last
BATCHES = 2  # that a calibration sees: its peak is that of the second
MOMENTS = 2  # tensors of AdamW for each trained one
Operations = list[tuple[int, int]]


@dataclass
class Rehearsal:
    """Bytes and counts of one run; ``peaks`` by phase: "attaching", "calibration" and "training".

    ``training`` and ``inference`` hold (floating-point operations, bytes moved) of each operation of one training
    step and of one forward pass.
    """

    weights: int = 0
    trainable: int = 0
    head: int = 0
    trained: int = 0
    stored: int = 0
    gradients: int = 0
    moments: int = 0
    saved: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    training: Operations = field(default_factory=list)
    inference: Operations = field(default_factory=list)


class Moments(torch.optim.Optimizer):
    """The state of a fused AdamW and what its step reads and writes."""

    def __init__(self, groups: list[dict[str, Any]], phantom: Phantom) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.phantom = phantom

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    # reads the parameter, its gradient and two moments; writes all but the gradient
                    self.phantom.operations.append((0, 7 * parameter.numel() * parameter.element_size()))

    def bytes(self) -> int:
        return measure.optimizer_bytes(self)


@dataclass
class Batches:
    """A few batches on the meta device, that can be gone through again."""

    body: Body
    rows: int
    length: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(BATCHES):
            yield batch_for(self.body, self.rows, self.length)

    def __len__(self) -> int:
        return BATCHES


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, as the tasks compute it."""
    from deltaworks.train.tasks import training_loss

    def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(labels.numel(), -1).float(), labels.reshape(-1))

    return training_loss(model, batch, of_logits)


def in_host_memory() -> saved_tensors_hooks:
    """Saved tensors that take none of the device's memory while they wait."""
    return saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.stride(), tensor.dtype),
        lambda kept: torch.empty_strided(*kept[:2], dtype=kept[2], device="meta"),
    )


def rehearse(
    body: Body, config: Config, rows: int, length: int, device: str, checkpointing: str | None = None
) -> Rehearsal:
    """Attach, calibrate, train a few steps and end, without values; ``device`` is "cpu" or "cuda".

    ``checkpointing`` is the recipe's. Raises UserError where the method does not fit the model.
    """
    model, phantom, found = body.model, Phantom(device), Rehearsal()
    found.weights = measure.model_bytes(model)
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        phantom.learn(tensor, Normal(std if tensor.dim() > 1 else 0.0 if name.endswith("bias") else math.inf))
    for module in model.modules():
        for tensor in storages(module):
            phantom.hold(tensor)
        if isinstance(module, Coded):
            module.learn = partial(phantom.learn, fact=Normal(std))
    with Kernels(device, phantom), phantom:
        delta = attach(model, config, also=body.head)
        found.peaks["attaching"] = phantom.turn()
        with checkpointed(delta, checkpointing, in_host_memory):
            batches = Batches(body, rows, length)
            delta.procedure.begin(Run(STEPS, batches, loss_of, Batches(body, 1, length)))
            found.peaks["calibration"] = phantom.turn()
            count(delta, body, found)
            batch = next(iter(batches))
            found.saved = measure.step_memory(model, lambda: loss_of(model, batch)).saved
            phantom.turn()
            train(delta, batch, phantom, found)
            found.peaks["training"] = phantom.turn()
            delta.procedure.end()
        found.stored = sum(tensor.numel() * tensor.element_size() for tensor in delta.tensors().values())
        phantom.operations.clear()
        with torch.no_grad(), evaluating(model):
            model(**{key: value for key, value in batch.items() if key != "labels" or body.task == "seq2seq"})
        found.inference = list(phantom.operations)
    return found


def train(delta: Delta, batch: dict[str, Tensor], phantom: Phantom, found: Rehearsal) -> None:
    """The steps, as ``train.loop`` has them."""
    optimizer = Moments(delta.parameter_groups(1e-3), phantom)
    delta.procedure.optimizing(optimizer)
    for _ in range(STEPS):
        phantom.operations.clear()
        loss = delta.procedure.loss(loss_of(delta.model, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
        delta.procedure.gradients()
        grads = [parameter.grad for parameter in delta.parameters() if parameter.grad is not None]
        found.gradients = max(found.gradients, sum(grad.numel() * grad.element_size() for grad in grads))
        del grads, loss
        optimizer.step()
        found.training = list(phantom.operations)
        found.moments = max(found.moments, optimizer.bytes())
        delta.procedure.stepped()
        optimizer.zero_grad()


def count(delta: Delta, body: Body, found: Rehearsal) -> None:
    """Trained values and bytes of the adapter, with the fresh head apart, as records have them."""
    fresh = {
        id(parameter)
        for item in delta.attached
        if isinstance(item.tuner, Replacement) and item.place.path in body.head
        for parameter in item.tuner.parameters()
    }
    sizes = {id(parameter): parameter.numel() for parameter in delta.parameters()}
    found.head = sum(size for key, size in sizes.items() if key in fresh)
    found.trainable = sum(sizes.values()) - found.head
    own = (tensor for tuner in delta.tuners() for tensor in (*tuner.parameters(), *tuner.buffers()))
    found.trained = sum({measure._address(t): t.untyped_storage().nbytes() for t in own}.values())
