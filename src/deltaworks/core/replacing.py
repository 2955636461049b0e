"""Other layers in the place of quantized ones: plain ones, and ones with the codes of another weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.quantized import dense_weight, is_coded, is_quantized


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what is not quantized, float32 where all is."""
    plain = (p for name, p in model.named_parameters() if ".deltas." not in name and not is_coded(p))
    return next((parameter.dtype for parameter in plain), torch.float32)


def plain_linear(model: nn.Module, module: Any, weight: Tensor) -> nn.Linear:
    """A linear layer of the model's dtype with a weight [out, in] and the bias of a quantized one."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(base_dtype(model)), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear.train(module.training)


def dequantize(model: Any) -> None:
    """Make every quantized layer of a model a plain one, so that it is saved and loaded like any other model."""
    for module in list(model.modules()):
        if is_quantized(module) and hasattr(module, "in_features"):
            replace(model, module, plain_linear(model, module, dense_weight(module)))
        elif is_quantized(module):
            module._parameters["weight"] = nn.Parameter(dense_weight(module), requires_grad=False)
    for module in model.modules():  # a model may hold another one
        quantizer = module.__dict__.get("hf_quantizer")
        if quantizer is not None:
            quantizer.remove_quantization_config(module)
            for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
                module.__dict__.pop(name, None)
            # how its files were read is how they will be written, but for what made codes of them
            conversions = module.__dict__.get("_weight_conversions")
            if conversions is not None:
                module._weight_conversions = [each for each in conversions if _is_reversible(each)]  # type: ignore[assignment]


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def quantized_again(model: nn.Module, module: Any, weight: Tensor) -> nn.Module:
    """A layer like a quantized one with the codes of another weight [out, in].

    Raises UserError where its library does not say how it was quantized.
    """
    old = module._parameters.get("weight")
    new = copy.copy(module)
    new._parameters = dict(module._parameters)
    kind = type(old).__name__
    if kind == "Params4bit":
        options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        codes = type(old)(weight.to(old.quant_state.dtype), quant_storage=old.quant_storage, module=new, **options)
        new.weight = codes.to(old.device)
    elif kind == "Int8Params":
        new.state = copy.copy(module.state)
        new.state.reset_grads()
        new.weight = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)
    else:
        config = _torchao_config(model)
        if config is None:
            mend = "merge into a dequantized copy, without requantize"
            raise UserError(f"a {type(old).__name__} does not tell how it was quantized, so it cannot be again: {mend}")
        from torchao.quantization import quantize_

        plain = plain_linear(model, module, weight)
        quantize_(plain, config)
        new.weight = plain.weight
    return new


def _torchao_config(model: nn.Module) -> Any:
    """How transformers quantized a model with torchao."""
    quantizers: Any = (module.__dict__.get("hf_quantizer") for module in model.modules())
    configs = (quantizer.quantization_config for quantizer in quantizers if quantizer is not None)
    return next((config.quant_type for config in configs if hasattr(config, "quant_type")), None)
