"""Base models that are quantized while they are loaded: the formats, and which layers they are for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn

from deltaworks.core.anatomy import anatomy
from deltaworks.core.errors import UserError
from deltaworks.core.places import features_of
from deltaworks.core.quantized import steady

Form = Literal["nf4", "fp4", "int8", "int8wo", "int4wo"]
"""bitsandbytes' three (Dettmers et al., 2023, arXiv:2305.14314, and 2022, arXiv:2208.07339), torchao's two."""
FORMS: tuple[str, ...] = get_args(Form)
TORCHAO = ("int8wo", "int4wo")
GROUPS = (128, 64, 32)  # entries that share a scale in int4wo


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized: ``double`` quantizes the scales of nf4 and fp4 too."""

    form: str
    double: bool = True

    def options(self, body: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What ``from_pretrained`` is told for a model whose shapes are those of ``body``; it computes in ``dtype``.

        Raises UserError where the library is missing or the model has no layers for it.
        """
        package = "torchao" if self.form in TORCHAO else "bitsandbytes"
        if find_spec(package) is None:
            raise UserError(f"quantize={self.form} needs {package}: pip install 'deltaworks[quantized]'")
        wanted = dict(quantizable(body, self.form))
        if not wanted:
            raise UserError(f"{type(body).__name__} has no linear layers in its blocks that {self.form} is for")
        others = (name for name, module in body.named_modules() if name and not any(module.children()))
        # the empty group keeps a name from being taken for the end of another one
        left = [f"{re.escape(name)}(?:)" for name in others if name not in wanted]
        config = self._torchao(wanted, left, device) if package == "torchao" else self._bitsandbytes(left, dtype)
        return {"quantization_config": config, "device_map": {"": str(device)}}

    def _bitsandbytes(self, left: list[str], dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        # its note that inputs are cast comes with every product
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if self.form == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=self.form, bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=left,
        )  # fmt: skip

    def _torchao(self, wanted: dict[str, nn.Module], left: list[str], device: torch.device) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config: Any = Int8WeightOnlyConfig() if self.form == "int8wo" else _int4(group_of(wanted.values()), device)
        return TorchAoConfig(config, modules_to_not_convert=left)


def group_of(layers: Iterable[nn.Module]) -> int:
    """The entries that share a scale in int4wo. Raises UserError where no number of them fits all layers."""
    layers = list(layers)
    group = next((size for size in GROUPS if all(features_of(layer)[0] % size == 0 for layer in layers)), None)
    if group is None:
        raise UserError("int4wo needs layers whose inputs are multiples of 32: take nf4")
    return group


def _int4(group: int, device: torch.device) -> Any:
    """Four bits in the layout that the device has kernels for."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group)
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    return Int4WeightOnlyConfig(group_size=group, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)


def quantizable(model: nn.Module, form: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a format is for: the linears inside the blocks, which leaves out embeddings and heads."""
    kinds = ("linear",) if form in TORCHAO else ("linear", "conv1d")
    for place in anatomy(model).places:
        if place.kind in kinds and place.part is None and place.block is not None:
            yield place.path, model.get_submodule(place.path)


def settle(model: nn.Module) -> None:
    """Keep the layers of a quantized base as they are while it is evaluated."""
    for module in model.modules():
        steady(module)
