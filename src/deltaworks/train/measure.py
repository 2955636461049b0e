"""What a run costs, measured: memory, activations, hardware, and the error of merging."""

from __future__ import annotations

import os
import platform
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.quantized import storages

INCLUDES_TENSORS = (
    "bytes of all tensors at the peak of a training step on the longest batch: base weights, adapter, gradients, "
    "optimizer state, activations and intermediate results; without interpreter and libraries, whose process needed "
    "process_peak_bytes in all"
)
INCLUDES_CUDA = (
    "largest memory that torch had allocated on the device in training: base weights, adapter, gradients, optimizer "
    "state, activations and intermediate results; without the context of the device"
)


@dataclass
class StepMemory:
    """Bytes of tensors in one forward and backward pass.

    ``saved`` is what the forward keeps for the backward; ``peak`` the most that was alive beside what was there
    before (activations, gradients, intermediate results).
    """

    saved: int
    peak: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[weakref.ref[Any], int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and _address(leaf) not in read:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        reference = weakref.ref(storage, self._gone)
        if reference not in self.live:
            self.live[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _gone(self, reference: weakref.ref[Any]) -> None:
        self.now -= self.live.pop(reference, 0)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def step_memory(model: nn.Module, loss_of: Callable[[], Tensor]) -> StepMemory:
    """Measure one forward and backward pass, not compiled; gradients are cleared, the random state is put back."""
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    # the tensors are kept while they are counted, or a storage could be freed and its address used again
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            saved.setdefault(_address(tensor), tensor.detach())
        # not the tensor itself: an operation that saves its own output would then keep its graph alive for ever
        return tensor.detach()

    # dynamo would pass over the forwards that it meets under a counter for good
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), _LiveBytes() as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of()
        kept = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
        saved.clear()
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return StepMemory(kept, counter.peak)


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once; the adapters are part of the model."""
    pieces = (tensor for module in model.modules() for tensor in storages(module))
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in pieces}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def process_peak_bytes() -> int | None:
    """Largest resident memory of this process so far: with interpreter, libraries and data; None where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def merge_error(delta: Delta, output_of: Callable[[], Tensor]) -> float | None:
    """Largest absolute difference of the output before and after merging; None where it cannot be merged."""
    if delta.limit("merge"):
        return None
    with torch.no_grad():
        before = output_of()
        try:
            delta.merge()
        except UserError:
            return None
        try:
            after = output_of()
        finally:
            delta.unmerge()
    return float((before.double() - after.double()).abs().max())


def hardware(device: torch.device) -> str:
    """The processor or accelerator and the memory, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    text = f"{name}, {os.cpu_count()} cores"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        text = f"{found.name}, {found.total_memory / 1e9:.0f} GB; {text}"
    return text


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
