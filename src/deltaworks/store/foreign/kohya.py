"""LoRA as kohya's sd-scripts, ComfyUI and the WebUI read it: ``lora.safetensors`` with down, up and alpha by path.

Names are those of diffusers' modules with underscores for dots, behind the part: ``lora_unet_...``, ``lora_te_...``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.store.files import check_writable
from deltaworks.store.foreign.lowering import factors_alone
from deltaworks.store.foreign.tensors import write_tensors

FILE = "lora.safetensors"
PARTS = {"UNet2DConditionModel": "lora_unet", "CLIPTextModel": "lora_te", "CLIPTextModelWithProjection": "lora_te2"}
"""The models whose modules this format names, and what stands in front of their paths."""


def write(delta: Delta, folder: Path, rank: int | None = None) -> None:
    """Write an adapter of a UNet or of its text encoder; ``rank`` cuts its change to a LoRA. Raises UserError."""
    name = type(delta.model).__name__
    part = next((PARTS[kind.__name__] for kind in type(delta.model).__mro__ if kind.__name__ in PARTS), None)
    if part is None:
        raise UserError(f"kohya's format names modules of {', '.join(PARTS)} alone, and this is a {name}")
    tensors: dict[str, Tensor] = {}
    weights = factors_alone(delta, rank, "kohya's format", ("linear", "conv2d"))
    for path, one in weights.items():
        key = f"{part}_{path.replace('.', '_')}"
        down, up = one.A, one.B
        if one.place.kind == "conv2d":
            down, up = down.view(one.rank, -1, *one.module.kernel_size), up[:, :, None, None]
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(one.scale * one.rank)
    ranks = {one.rank for one in weights.values()}
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks))}
    check_writable(folder)
    write_tensors(folder / FILE, tensors, metadata)
