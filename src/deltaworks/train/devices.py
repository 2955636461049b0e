"""One run over several devices: ``torchrun`` or ``accelerate launch`` start a process for each.

Every process trains on its share of each batch. Losses and gradients are summed with the weight that a share has in
the mean over the whole batch, so that the run is that of one process but for rounding and the draws of dropout. Terms
that a method adds to the loss are those of the shares, averaged with the same weights.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.sites import stable_hash
from deltaworks.train.batching import Encoded

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while the main process evaluates


@dataclass(frozen=True)
class Team:
    """The processes of one run. Alone, it hands back what it gets."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of this process

    @property
    def main(self) -> bool:
        """Whether this process evaluates, saves and prints."""
        return self.rank == 0

    @property
    def words(self) -> str:
        """What a record adds to measurements of one process."""
        return "" if self.size == 1 else f"; one of {self.size} processes"

    def share(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """This process's examples of a batch; the first one, which then weighs nothing, where there are too few."""
        return list(examples[self.rank :: self.size]) or list(examples[:1])

    def weighted(
        self, loss: Tensor, examples: Sequence[Encoded], counted: Callable[[Sequence[Encoded]], int]
    ) -> Tensor:
        """The loss of the share as its part of the loss of the whole batch."""
        if self.size == 1:
            return loss
        part = counted(examples[self.rank :: self.size]) / max(1, counted(examples))
        return loss * part if part else loss.nan_to_num() * 0.0  # a mean over nothing is not a number

    @contextmanager
    def own_chance(self, name: str) -> Iterator[None]:
        """Draws that differ between the processes and leave the generators of torch as they were, the same in all."""
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device and self.device.type == "cuda" else []):
            torch.manual_seed(stable_hash(f"{name}/{self.rank}"))
            yield

    def sum(self, value: float) -> float:
        """The sum of a number over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    @torch.no_grad()
    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes; a parameter that has none in any process keeps none."""
        if self.size == 1:
            return
        present = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten().float() for part in (*parts, present)])
        dist.all_reduce(flat)
        *sums, present = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
        for parameter, total, seen in zip(parameters, sums, present.tolist(), strict=True):
            if seen:
                parameter.grad = total.view_as(parameter).to(parameter.dtype)

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the gradients the mean over the processes, as DDP does."""
        self.add_up(parameters)
        for parameter in parameters:
            if self.size > 1 and parameter.grad is not None:
                parameter.grad /= self.size

    @torch.no_grad()
    def unite(self, delta: Delta) -> None:
        """Give the adapter of the main process to all. Raises UserError where it has other shapes than theirs."""
        if self.size == 1:
            return
        every = (tensor for tuner in delta.tuners() for tensor in (*tuner.parameters(), *tuner.buffers()))
        tensors = {id(tensor): tensor for tensor in every if tensor.numel()}
        self._agree(delta, stable_hash(str([tensor.shape for tensor in tensors.values()])))
        for tensor in tensors.values():
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)

    @torch.no_grad()
    def check(self, delta: Delta) -> None:
        """Raises UserError where the processes no longer hold the same adapter."""
        if self.size > 1:
            # what a procedure measured may differ by rounding, what it chose may not
            leaves = [leaf for leaf in tree_leaves(delta.procedure.state()) if isinstance(leaf, Tensor)]
            chosen = [leaf for leaf in leaves if not leaf.is_floating_point()]
            held = [*delta.tensors(training=True).values(), *chosen]
            self._agree(delta, stable_hash(str([float(tensor.double().sum()) for tensor in held])))

    def _agree(self, delta: Delta, mark: int) -> None:
        marks = [torch.tensor([0], device=self.device) for _ in range(self.size)]
        dist.all_gather(marks, torch.tensor([mark], device=self.device))
        if len({int(each) for each in marks}) > 1:
            raise UserError(f"{delta.config} decides by what each process sees for itself: train it in one process")

    def of_main(self, compute: Callable[[], T]) -> T:
        """What ``compute`` gives in the main process, for all of them."""
        if self.size == 1:
            return compute()
        box = [compute() if self.main else None]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]  # type: ignore[return-value]


def join(device: str) -> Team:
    """The processes that were started together; this one alone where ``WORLD_SIZE`` names no more.

    Raises UserError for a device that processes cannot share, or that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if not cuda and device not in ("auto", "cpu"):
        raise UserError(f"device={device} is one device, and {size} processes were started: give auto or cpu")
    place = torch.device("cpu")
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(f"more processes were started than the {torch.cuda.device_count()} devices that are there")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Team(dist.get_rank(), size, place)
