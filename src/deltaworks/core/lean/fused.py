"""The fused kernels of liger-kernel, which take the place of norms and gated products on a GPU where it is installed.

They keep what the functions of ``neighbours`` keep, and compute the same to rounding, in one kernel each way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 65_536
"""Features that one block of a kernel holds."""

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": functools.partial(F.gelu, approximate="tanh"),
}
"""The functions of a gate that there are kernels of, by the names of these."""


@functools.cache
def _kernels() -> Any:
    try:
        from liger_kernel import ops
    except ImportError:
        return None
    return ops


def _covers(x: Tensor) -> bool:
    fits = x.dtype in DTYPES and 0 < x.shape[-1] <= WIDEST and x.numel() > 0
    return fits and x.device.type in DEVICES and _kernels() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, gain: float) -> Callable[[Tensor], Tensor] | None:
    """The function x -> (weight + gain) * x / rms(x) with its gradient for x; None where no kernel covers this x."""
    if not _covers(x) or weight.dtype != x.dtype:
        return None
    rounding = "gemma" if gain else "llama"  # after the product with the weight, or before it
    function = _kernels().LigerRMSNormFunction
    return lambda x: function.apply(x, weight, eps, gain, rounding, False)


@torch.no_grad()
def gate_of(activation: nn.Module) -> str | None:
    """Which of GATES an activation is, told by its values; None for another one."""
    with torch.device("cpu"):  # models are built on the meta device too
        x = torch.linspace(-6, 6, 49, dtype=torch.float64)
        y = type(activation).forward(activation, x)
    return next((name for name, function in GATES.items() if torch.allclose(y, function(x), atol=1e-9)), None)


class Gated:
    """f(gate) * up of one shape [..., width], and its gradients; f is that ``name`` of GATES."""

    def __init__(self, name: str) -> None:
        self._forward = getattr(_kernels(), f"{name}_forward")
        self._backward = getattr(_kernels(), f"{name}_backward")

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = self._forward(gate.contiguous(), up.contiguous())[-1]
        return y

    again = product

    def gradients(self, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # the kernel writes over its arguments, which others need as they are
        own = [x.clone(memory_format=torch.contiguous_format) for x in (gate, up)]
        d_gate, d_up = self._backward(*own, gradient.contiguous())
        return d_gate, d_up


def gated(name: str | None, gate: Tensor) -> Gated | None:
    """The kernels of the function ``name`` of GATES; None where they do not cover this gate."""
    return Gated(name) if name is not None and _covers(gate) else None
