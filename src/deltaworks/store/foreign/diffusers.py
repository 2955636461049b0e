"""Adapters of diffusers 0.42: one ``pytorch_lora_weights.safetensors`` for the parts of a pipeline.

``pipe.load_lora_weights(folder)`` and ``model.load_lora_adapter(folder, prefix=part)`` read it. Tensors are named as
peft names them, behind the part they belong to: ``unet.<path>.lora_A.weight``; the metadata of the file holds a peft
configuration of each part. Files without it, whose ranks and scales are those of the tensors, are read too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.store.files import check_writable
from deltaworks.store.foreign import lost, peft
from deltaworks.store.foreign.peft_table import LORA, TYPES
from deltaworks.store.foreign.peft_written import written
from deltaworks.store.foreign.tensors import read_metadata, read_tensors, write_tensors

WEIGHTS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What diffusers calls the models of a pipeline that an adapter can stand in."""
HELD = ("LORA", "LOKR")
"""The types of peft that diffusers reads from this file; other methods are written as LoRA."""


def recognises(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def write(delta: Delta, folder: Path, rank: int | None = None) -> None:
    """Write an adapter beside those of other parts of its pipeline; ``rank`` makes it a LoRA. Raises UserError."""
    part, path = part_of(delta.model), folder / WEIGHTS
    check_writable(folder)
    data, tensors = written(delta, rank, [row for row in TYPES if row.peft in HELD])
    if data.get("modules_to_save") or data.get("bias", "none") != "none":
        raise UserError("diffusers reads no modules or biases that are trained in full: leave also= and bitfit out")
    others, metadata = _read(path) if path.is_file() else ({}, {})
    merged = {key: value for key, value in others.items() if _part(key) not in (part, "")}
    merged |= {f"{part}.{key.removeprefix(LORA.prefix)}": value for key, value in tensors.items()}
    metadata = {key: value for key, value in metadata.items() if _part(key) not in (part, "")}
    metadata |= {f"{part}.{key}": value for key, value in data.items()}
    write_tensors(path, merged, {"format": "pt", METADATA: json.dumps(metadata, indent=2, sort_keys=True)})


def read(model: nn.Module, folder: Path, name: str) -> Delta:
    """Attach what a file holds for this model. Raises UserError that lists what is missing, extra or misshapen."""
    part, path = part_of(model), folder / WEIGHTS
    tensors, metadata = _read(path)
    parts = list(dict.fromkeys(map(_part, tensors)))
    mine = part if part in parts else ""
    if mine not in parts:
        raise UserError(f"{str(path)!r} holds adapters of {' and '.join(parts)}, not of the {part}")
    if others := [other for other in parts if other != mine]:
        lost(f"{path.name} also holds adapters of {' and '.join(others)}, which are other models")
    own = _of(mine, tensors)
    data = _of(mine, metadata)
    if not any(".lora_A" in key or ".lokr_" in key for key in own):
        own = _renamed(own)
    data = data or _inferred(path, own)
    own = {f"{LORA.prefix}{key}": value for key, value in own.items() if not key.endswith(".alpha")}
    return peft.attached(model, data, own, path, name)


def part_of(model: nn.Module) -> str:
    """What diffusers calls this model in its pipelines. Raises UserError for one that it loads no adapters into."""
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    if ("diffusers", "PeftAdapterMixin") in kinds:
        return "unet" if type(model).__name__.startswith("UNet") else "transformer"
    if ("transformers", "CLIPTextModel") in kinds:
        return "text_encoder"
    raise UserError(f"diffusers loads no adapter into a {type(model).__name__}: use format='peft'")


def _part(key: str) -> str:
    """The part that a name of the file belongs to, "" where it names none."""
    first = key.partition(".")[0]
    return first if first in PARTS else ""


def _of(part: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{part}."): value for key, value in entries.items() if _part(key) == part}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configurations of a file. Raises UserError where it is damaged."""
    tensors, text = read_tensors(path), read_metadata(path).get(METADATA, "{}")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{str(path)!r} has metadata that are no JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{str(path)!r} has metadata that are no configuration")
    return tensors, metadata


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that diffusers used before it used peft's, as peft's."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(dict(tensors))
    return renamed


def _inferred(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that diffusers takes from the tensors: ranks as they are, scales of one but for an alpha."""
    ranks = {key.partition(".lora_B.")[0]: value.shape[1] for key, value in tensors.items() if ".lora_B." in key}
    if not ranks:
        raise UserError(f"{str(path)!r} holds no LoRA by the names of diffusers or of peft")
    alphas = {own: float(tensors[f"{own}.alpha"]) if f"{own}.alpha" in tensors else rank for own, rank in ranks.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(own)}$": value for own, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(own)}$": value for own, value in alphas.items() if value != alpha},
        "use_dora": any("lora_magnitude_vector" in key for key in tensors),
    }
