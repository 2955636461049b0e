"""What a run needs, told before a weight is loaded: memory, arithmetic and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaworks.advise.bodies import build, check_length
from deltaworks.advise.hardware import find_hardware
from deltaworks.advise.quantized import quantize as quantize_body
from deltaworks.advise.rehearsal import rehearse
from deltaworks.core.errors import UserError
from deltaworks.core.quantized import entries
from deltaworks.core.registry import configure
from deltaworks.train.checkpointing import check_kind

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Estimate:
    """What training one adapter needs, by an estimate; sizes in bytes, times in seconds.

    Attributes:
        trainable: Trained values of the method; ``head`` those of a fresh classifier beside it.
        stored_bytes: Tensors of the saved adapter.
        weight_bytes: The frozen base.
        trained_bytes: The adapter's own tensors, float32 masters.
        gradient_bytes, optimizer_bytes: Of one step; AdamW keeps two moments.
        activation_bytes: What the forward pass keeps for the backward pass.
        peak_bytes: All tensors that are alive at once, at most, in ``peak_phase``: "attaching", "calibration" or
            "training". Without interpreter, libraries and the device's own context.
        flops: Floating-point operations of one training step (matrix products, convolutions, attention).
        inference_flops: Those of one forward pass of the same batch.
        step_seconds: One training step on ``hardware``, by a roofline over its operations.
        memory_bytes: What ``hardware`` has.
    """

    model: str
    method: str
    task: str
    batch: int
    length: int
    dtype: str
    quantize: str | None
    checkpointing: str | None
    parameters: int
    trainable: int
    head: int
    stored_bytes: int
    weight_bytes: int
    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int
    peak_phase: str
    flops: int
    inference_flops: int
    step_seconds: float
    inference_seconds: float
    samples_per_second: float
    hardware: str
    memory_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the peak is less than the memory of the hardware."""
        return self.peak_bytes < self.memory_bytes


def estimate(
    model: str,
    method: str,
    *,
    batch: int,
    length: int,
    task: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    double_quantization: bool = True,
    checkpointing: str | None = None,
    hardware: str | None = None,
    labels: int = 2,
) -> Estimate:
    """Rehearse a run on the meta device: nothing is loaded and nothing computed.

    Args:
        model: What ``load_model`` takes, or a file config.json; of a Hub id only the configuration is read.
        method: A method or a composition, such as "lora[rank=16]".
        batch: Rows of a batch; all are ``length`` tokens long.
        length: Tokens of a row, of input and of target.
        task: Default: what the model's configuration says, or the first task that it can do.
        dtype: Of the base weights and of the arithmetic: "float32", "bfloat16", "float16" or "bf16" and the like.
        quantize: "nf4", "fp4", "int8", "int8wo" or "int4wo" for the linear layers in the blocks of the base.
        double_quantization: Whether the scales of nf4 and fp4 are quantized too.
        checkpointing: Which blocks are computed again in the backward pass: "block", "selective" or "offload".
        hardware: A name of the table; default: this machine, as it was measured once ("here": measured now).
        labels: Number of classes.

    Raises:
        UserError: Something of these is not known, or the model cannot do it.
    """
    for what, value in (("batch", batch), ("length", length), ("labels", labels)):
        if value < 1:
            raise UserError(f"{what}={value} is none: give at least 1")
    dtype = SHORT.get(dtype, dtype)
    config, machine = configure(method), find_hardware(hardware)
    check_kind(checkpointing, torch.device(machine.device))
    body = build(model, task, max(2, labels), dtype)
    check_length(body, length)
    if quantize is not None:
        quantize_body(body, quantize, double_quantization)
    parameters = sum(map(entries, body.model.parameters()))
    try:
        run = rehearse(body, config, batch, length, machine.device, checkpointing)
    except NotImplementedError as error:  # torch has no answer without values
        raise UserError(
            f"{body.name} with the task {body.task} decides by values, which a plan has none of: give another --task"
        ) from error
    phase = max(run.peaks, key=lambda name: run.peaks[name])
    step, forward = (machine.seconds(each, dtype) for each in (run.training, run.inference))
    return Estimate(
        model=body.name, method=str(config), task=body.task, batch=batch, length=length, dtype=dtype,
        quantize=quantize, checkpointing=checkpointing, parameters=parameters, trainable=run.trainable, head=run.head,
        stored_bytes=run.stored, weight_bytes=run.weights, trained_bytes=run.trained,
        gradient_bytes=run.gradients, optimizer_bytes=run.moments, activation_bytes=run.saved,
        peak_bytes=run.peaks[phase], peak_phase=phase,
        flops=sum(flops for flops, _ in run.training), inference_flops=sum(flops for flops, _ in run.inference),
        step_seconds=step, inference_seconds=forward, samples_per_second=batch / step,
        hardware=machine.name, memory_bytes=machine.memory,
    )  # fmt: skip
