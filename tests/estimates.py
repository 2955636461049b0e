"""A stand-in for the estimator: sizes by simple formulas, so that tests of advice need no model."""

from types import SimpleNamespace
from typing import Any

from deltaworks.core.errors import UserError
from deltaworks.core.registry import configure

SIZES = {"small": 22_000_000, "large": 7_000_000_000}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(
    model: str,
    method: str,
    *,
    batch: int,
    length: int,
    task: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    checkpointing: bool = False,
    hardware: str | None = None,
    labels: int = 2,
) -> Any:
    """Bytes of a model of so many parameters: adapters by rank, LoRA's activations 400 bytes for each row and token
    and square root of a parameter; checkpointing keeps a tenth of them."""
    config = configure(method)
    if config.name == "bitfit":
        raise UserError("none of the targets has a bias")
    parameters = SIZES[model]
    rank = config.options().get("rank", 8)
    trained = parameters if config.name == "full" else round(parameters**0.5 * 70 * rank)
    trained = {"head": 30_000, "ia3": 14_000, "ln": 10_000, "prompt": 7_700}.get(config.name, trained)
    weights = round(parameters * (0.52 if quantize else BYTES[dtype]))
    share = {"lst": 0.2, "head": 0.0, "houlsby": 0.8, "ia3": 0.9}.get(config.name, 1.0) * (0.1 if checkpointing else 1)
    activations = round(400 * batch * length * parameters**0.5 / 64 * share)
    return SimpleNamespace(
        task=task or "classification", parameters=parameters, trainable=trained, stored_bytes=4 * trained + 2000,
        weight_bytes=weights, activation_bytes=activations, peak_bytes=weights + 16 * trained + activations,
        step_seconds=batch * length * parameters / 1e13, memory_bytes=16_000_000_000, quantize=quantize, dtype=dtype,
    )  # fmt: skip
