"""Small models with quantized linears, made by the libraries themselves."""

from typing import Any

import torch
from torch import nn

from deltaworks.train.quantizing import settle

FORMATS = ("nf4", "nf4-single", "fp4", "int8", "int8wo", "int4wo")
"""bitsandbytes' 4 bits, with and without double quantization, and 8 bits; torchao's weights alone."""


def quantize(model: nn.Module, form: str) -> nn.Module:
    """The model with its linear layers quantized in place, but for the last one (the head)."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in linears[:-1]:
        model.set_submodule(name, quantized(model.get_submodule(name), form))
    settle(model)
    return model


@torch.no_grad()
def quantized(linear: Any, form: str) -> nn.Module:
    """One quantized layer with the values of a plain one."""
    if form.endswith("wo"):
        return _torchao(linear, form)
    from bitsandbytes import nn as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    layer: Any
    if form == "int8":
        layer = bnb.Linear8bitLt(*sizes, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        kind, _, single = form.partition("-")
        layer = bnb.Linear4bit(*sizes, quant_type=kind, compress_statistics=not single)
        weight = linear.weight.data.clone()
        layer.weight = bnb.Params4bit(weight, quant_type=kind, compress_statistics=not single, module=layer)
    layer.bias = linear.bias
    return layer.to("cpu").requires_grad_(False).train(linear.training)


def _torchao(linear: nn.Module, form: str) -> nn.Module:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = {"int8wo": Int8WeightOnlyConfig(), "int4wo": PrototypeInt4WeightOnlyConfig(group_size=32)}
    quantize_(linear, config[form])
    return linear
