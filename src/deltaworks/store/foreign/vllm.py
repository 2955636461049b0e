"""LoRA for vLLM's multi-adapter serving: peft's files, within the limits of its reader (0.10 to 0.12).

Its reader takes A and B alone, knows one rank and one scale for all modules, and refuses DoRA, trained biases and
modules that are saved whole. So every scale is folded into B here, every rank padded with zeros to one that
``--max-lora-rank`` can be, and what is no product of A and B is refused, or cut to a ``rank``.
"""

from __future__ import annotations

from pathlib import Path

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.store.files import check_writable
from deltaworks.store.foreign import targets
from deltaworks.store.foreign.lowering import factors_alone, padded
from deltaworks.store.foreign.peft import CONFIG, WEIGHTS
from deltaworks.store.foreign.peft_written import lora_file
from deltaworks.store.foreign.tensors import write_json, write_tensors

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``--max-lora-rank`` takes."""
KINDS = ("linear", "conv1d", "embedding")


def write(delta: Delta, folder: Path, rank: int | None = None) -> None:
    """Write an adapter that vLLM serves; ``rank`` cuts its change to a LoRA of that rank. Raises UserError."""
    whole = factors_alone(delta, rank, "vLLM", KINDS)
    largest = max(one.rank for one in whole.values())
    if largest > RANKS[-1]:
        raise UserError(
            f"vLLM serves ranks up to {RANKS[-1]}, and this adapter has {largest}: give a rank to cut it to"
        )
    served = next(rank for rank in RANKS if rank >= largest)
    folded = {path: padded(one.folded(), served) for path, one in whole.items()}
    fields, tensors = lora_file(folded)
    names = targets.ends(list(folded), targets.module_names(delta.model))
    base = getattr(getattr(delta.model, "config", None), "_name_or_path", None) or None
    data = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none", **fields}
    check_writable(folder)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, data | {"target_modules": names, "modules_to_save": None, "inference_mode": True})
