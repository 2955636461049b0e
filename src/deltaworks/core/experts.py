"""Experts with low-rank products beside their matrices: nothing of the size of their weights is formed.

Through effective weights a step would make a copy of the experts in forward, and their gradient in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.weights import expert_factors, is_expert_product

_SAYS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "_apply_gate")
"""What transformers notes on a class of experts, for all functions that multiply them."""
_ALIGNED = 16  # bytes of a row, for grouped products


def can_run(module: Any, tuners: Sequence[Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> bool:
    """Whether products can stand beside the matrices of these experts, as they are called."""
    if torch.compiler.is_compiling() or keywords or len(arguments) != 3 or arguments[0].device.type == "meta":
        return False
    known = all(hasattr(module, name) for name in _SAYS) and not module._is_expert_parallel
    return known and all(is_expert_product(tuner) for tuner in tuners)


def run(module: Any, tuners: Sequence[Any], x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """The sum over the chosen experts of each token. Shapes: x [tokens, width], chosen and gates [tokens, k]."""
    expert, order = chosen.reshape(-1).sort(stable=True)
    count = module._parameters["down_proj"].shape[0]
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True).int()
    changes = expert_factors(tuners, module._parameters)

    def linear(name: str, x: Tensor) -> Tensor:
        weight = module._parameters[name]
        x = x.to(weight.dtype)
        y = grouped(x, weight if module.is_transposed else weight.mT, ends)
        if module.has_bias:
            y = y + module._parameters[f"{name}_bias"][expert]
        if name in changes:
            A, B = _aligned(*changes[name][:2], weight.dtype)
            y = y + grouped(grouped(x, A.mT, ends), B.mT, ends)
        return y

    inner = linear("gate_up_proj" if module.has_gate else "up_proj", x[order // chosen.shape[-1]])
    y = linear("down_proj", module._apply_gate(inner) if module.has_gate else module.act_fn(inner))
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * gates.reshape(-1)[order, None]
    return torch.zeros_like(y).index_copy(0, order, y).view(*chosen.shape, -1).sum(1).to(x.dtype)


def _aligned(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors in the dtype of the weight, with a rank whose rows grouped products can read."""
    A, B = A.to(dtype), B.to(dtype)
    more = -A.shape[1] % (_ALIGNED // A.element_size())
    return F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The rows of x [rows, in] that end at ``ends`` [experts] times the matrix of each expert [experts, in, out]."""
    if _has_kernel(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    pieces = x.tensor_split(ends[:-1].tolist())
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, weight, strict=True)])


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    aligned = all(size * weight.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
    if not aligned or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)
