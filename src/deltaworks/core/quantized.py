"""Layers whose weight is stored as codes: found, and read as plain matrices, whichever library made them.

Known are bitsandbytes' two, and layers (HQQ) and tensors (torchao) that dequantize themselves. Of any other linear
layer the weight is what the layer makes of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ROWS = 1024  # of the identity that go through a layer at once


def is_coded(tensor: Tensor) -> bool:
    """Whether a tensor holds codes instead of values: integers, 8-bit floats, or a subclass that wraps such."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return any(is_coded(getattr(tensor, name)) for name in names)
    packed = getattr(tensor, "quant_state", None) is not None  # bitsandbytes may keep its codes in a float type
    return packed or not tensor.is_floating_point() or tensor.element_size() == 1


def is_quantized(module: nn.Module) -> bool:
    """Whether a module keeps its weight as codes."""
    if torch.compiler.is_compiling():  # which does not see what a tensor wraps
        return bool(module.__dict__.get("_quantized"))
    weight = module._parameters.get("weight")
    if weight is not None:
        return is_coded(weight)
    return isinstance(getattr(module, "in_features", None), int) and any(map(is_coded, _own(module)))


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def storages(module: Any) -> Iterator[Tensor]:
    """The plain tensors that a module's own parameters and buffers are kept in: of quantized ones codes and scales."""
    for tensor in _own(module):
        yield from _pieces(tensor)
    if (scales := _int8_scales(module)) is not None:
        yield scales


def _pieces(tensor: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _pieces(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
        yield from (state.absmax, state.code, *nested)


def _int8_scales(module: Any) -> Tensor | None:
    """The scales of bitsandbytes' int8, which the first forward moves from the weight to the layer."""
    scales = getattr(module._parameters.get("weight"), "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def entries(parameter: Tensor) -> int:
    """The number of values that a parameter stands for: bitsandbytes packs two codes of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def dense_weight(module: Any) -> Tensor:
    """The weight of a quantized layer as a plain tensor, [out, in] of a linear one.

    In the dtype that it was quantized from; of bitsandbytes' int8, which does not keep it, in float32.
    """
    if hasattr(module, "dequantize"):
        return module.dequantize()
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    if (scales := _int8_scales(module)) is not None:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, scales)
    if weight is not None and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    return _of_identity(module)


@torch.no_grad()
def _of_identity(module: Any) -> Tensor:
    """What the layer's own forward, without its bias, makes of the unit vectors."""
    forward = module.__dict__.get("_plain_class", type(module)).forward
    own = list(_own(module))
    dtype = next((tensor.dtype for tensor in own if tensor.is_floating_point() and tensor.element_size() > 1), None)
    unit = torch.eye(module.in_features, dtype=dtype, device=own[0].device)
    home = module._buffers if module._buffers.get("bias") is not None else module._parameters
    bias, home["bias"] = home.get("bias"), None
    try:
        return torch.cat([forward(module, rows) for rows in unit.split(ROWS)]).t().contiguous()
    finally:
        home["bias"] = bias


class _Product(torch.autograd.Function):
    """W x + b by the layer's own kernel, and its gradient for x by W dequantized anew: neither x nor W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, run: Callable[..., Tensor]) -> Tensor:
        ctx.module = module
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dtype = compute_dtype(ctx.module, gradients[0])
        return (gradients[0].to(dtype) @ dense_weight(ctx.module).to(dtype)).to(gradients[0].dtype), None, None


def product(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run``, the forward of a quantized linear layer, with a gradient that its kernel need not have."""
    x = args[0] if args else None
    if torch.compiler.is_compiling() or x is None or not (torch.is_grad_enabled() and x.requires_grad):
        return run(*args, **kwargs)
    return _Product.apply(x, module, run)


def compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a quantized linear layer multiplies: its own, where it has one, else that of its input."""
    return getattr(module, "compute_dtype", None) or x.dtype


def steady(module: Any) -> bool:
    """Keep a layer from repacking its weight; whether it was about to.

    bitsandbytes repacks 4-bit weights on a CPU with bfloat16 instructions when they are evaluated: the scales are
    rounded, layers whose sizes are no multiples of 32 and 64 fail, and there is no gradient any more.
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return False
    module.support_avx512bf16_for_cpu = False
    module.state_dict()  # unpacks a weight that is packed already
    return True
