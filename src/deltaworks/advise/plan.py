"""``deltaworks plan``: an estimate as a person reads it, or as JSON."""

from __future__ import annotations

import dataclasses
import json

from deltaworks.advise.estimate import Estimate
from deltaworks.compare.wording import show_bytes, show_count, show_seconds, show_share, three_digits

CAUTION = "An estimate: rows are full, what a method chooses by values is spread evenly, and the time is a roofline."

AGAIN = {
    "block": "blocks computed again",
    "selective": "every second block computed again",
    "offload": "blocks computed again from inputs in the host's memory",
}
FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def as_json(found: Estimate) -> str:
    """All numbers, and whether it fits."""
    return json.dumps({**dataclasses.asdict(found), "fits": found.fits}, indent=1)


def verdict(found: Estimate) -> str:
    """Whether the run fits, in one sentence."""
    room, peak = show_bytes(found.memory_bytes), show_bytes(found.peak_bytes)
    if found.fits:
        return f"fits in {room} ({found.hardware}): {peak} at the peak, in {found.peak_phase}"
    mends = [] if found.quantize else ["--quantize nf4"]
    mends += [] if found.checkpointing else ["--checkpointing block"]
    mends += ["a smaller --batch or --length"] if found.batch > 1 else ["a shorter --length"]
    return (
        f"does not fit in {room} ({found.hardware}): {peak} at the peak, in {found.peak_phase}; "
        f"try {', '.join(mends[:-1])}{' or ' if mends[:-1] else ''}{mends[-1]}"
    )


def show_flops(count: int) -> str:
    """Floating-point operations such as ``48.2 GFLOP``, ``43.1 TFLOP``."""
    size, unit = next(((size, unit) for size, unit in FLOPS if count >= 0.9995 * size), FLOPS[-1])
    return f"{three_digits(count / size)} {unit}"


def as_text(found: Estimate) -> str:
    """A table and a verdict."""
    quantized = f", base in {found.quantize}" if found.quantize else ""
    again = f", {AGAIN[found.checkpointing]}" if found.checkpointing else ""
    shape = f"{found.batch}" if found.task == "images" else f"{found.batch} x {found.length}"
    head = f", and {show_count(found.head)} of the fresh head" if found.head else ""
    rows = {
        "model": f"{found.model}, {show_count(found.parameters)} parameters, {found.dtype}{quantized}",
        "method": f"{found.method}, {found.task}, batches of {shape}{again}",
        "trainable": f"{show_count(found.trainable)} ({show_share(found.trainable, found.parameters)}){head}",
        "stored": show_bytes(found.stored_bytes),
        "": "",
        "base weights": show_bytes(found.weight_bytes),
        "trained tensors": show_bytes(found.trained_bytes),
        "gradients": show_bytes(found.gradient_bytes),
        "optimizer": show_bytes(found.optimizer_bytes),
        "saved activations": show_bytes(found.activation_bytes),
        "peak": f"{show_bytes(found.peak_bytes)}, in {found.peak_phase}",
        " ": "",
        "training step": f"{show_flops(found.flops)}, {show_seconds(found.step_seconds)}, "
        f"{found.samples_per_second:.3g} samples/s on {found.hardware}",
        "inference": f"{show_flops(found.inference_flops)}, {show_seconds(found.inference_seconds)} a batch",
    }
    lines = [f"{key:<19}{text}".rstrip() for key, text in rows.items()]
    return "\n".join([*lines, "", verdict(found)[0].upper() + verdict(found)[1:] + ".", CAUTION])
