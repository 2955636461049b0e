"""Operations on the meta device take the kernels of the device that is meant, which save other tensors for backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from deltaworks.advise.phantom import Phantom

aten = torch.ops.aten


class Kernels(TorchFunctionMode):
    """Lets operations on meta tensors save what they save on a device: "cpu" or "cuda"."""

    def __init__(self, device: str, phantom: Phantom) -> None:
        super().__init__()
        self.cuda, self.phantom = device == "cuda", phantom

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self.attention(*args, **kwargs)
        if func is F.dropout and self.cuda and args[0].is_meta:
            return self.dropout(*args, **kwargs)
        if func is Tensor.backward:  # torch leaves the mode for it, but blocks that are computed again need it
            with self:
                seed = torch.ones_like(args[0]) if kwargs.get("gradient") is None else kwargs["gradient"]
                keep, again = kwargs.get("retain_graph"), bool(kwargs.get("create_graph"))
                keep = again if keep is None else keep
                inputs = tuple(kwargs.get("inputs") or ())
                return _engine_run_backward(
                    args, (seed,), keep, again, inputs, allow_unreachable=True, accumulate_grad=True
                )
        result = func(*args, **kwargs)
        if func is torch.tensor and result.is_meta:
            self.phantom.learn(result, torch.tensor(args[0], dtype=kwargs.get("dtype")))
        return result

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and 0 < p < 1 else x

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The fused kernel where the device has one for these arguments, else the plain products."""
        if self.cuda:
            return self.attention_of_cuda(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        q, k, v = (_small(each) for each in (query, key, value))
        mask = None if attn_mask is None else _small(attn_mask[..., :1])
        with torch.enable_grad():  # asked of torch itself, with real tensors of one token
            choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if choice == torch.nn.attention.SDPBackend.MATH.value:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, -math.inf)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def attention_of_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
        scale: float | None, grouped: bool,
    ) -> Tensor:  # fmt: skip
        if mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, False, scale=scale)[0]
        if grouped:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        if mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            mask = (
                torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0) if mask.dtype == torch.bool else mask
            )
            mask = mask.expand(shape)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, torch.is_grad_enabled(), dropout, causal, scale=scale
        )[0]


def _small(tensor: Tensor) -> Tensor:
    """A real tensor with the heads and features of one on meta, and one row and token."""
    shape = [1 if dim in (0, tensor.dim() - 2) else size for dim, size in enumerate(tensor.shape)]
    return torch.zeros(shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
