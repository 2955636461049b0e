"""Outputs and gradients with liger-kernel beside torch's own, its kernels run by Triton's interpreter.

    python tests/interpreted.py llama lora    # prints JSON

No GPU is needed: Triton runs a kernel block by block in numpy. Of what these kernels call its interpreter knows neither
methods of numbers nor the functions of CUDA's own library, which stand here.
"""

import collections
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
import transformers as hf
import triton.language as tl
import zoo
from conformance import begin, build, disturb
from liger_kernel import ops
from triton.runtime import interpreter

import deltaworks as dw
from deltaworks.core.lean import fused
from deltaworks.core.lean.remaking import ordinary

FUSED = ("LigerRMSNormFunction", "swiglu_forward", "swiglu_backward", "geglu_forward", "geglu_backward")


def stand_in() -> None:
    """Give the interpreter what it lacks."""
    converted = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(
                interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32), tl.float32
            )
        return converted(value)

    interpreter._implicit_cvt = with_floats
    module_of = {function: sys.modules[getattr(ops, function).__module__] for function in FUSED}
    module_of["LigerRMSNormFunction"].rsqrt = lambda x: tl.math.rsqrt(x)
    module_of["geglu_forward"].tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def counting(calls: dict[str, int]) -> None:
    """Count the calls of the kernels."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for name in FUSED:
        kernel = getattr(ops, name)
        if isinstance(kernel, type):
            kernel.apply = staticmethod(counted(name, kernel.apply))  # type: ignore[attr-defined]
        else:
            setattr(ops, name, counted(name, kernel))


def results(family: str, spec: str, lean: bool) -> list[torch.Tensor | None]:
    """The output and the gradients of the trained tensors."""
    model, inputs = build(family)
    delta = dw.attach(model, spec)
    begin(delta, family, inputs)
    disturb(delta)
    with contextlib.nullcontext() if lean else ordinary():
        output = zoo.output_of(family, model, inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * weights).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in delta.parameters())]


def main(family: str, spec: str) -> None:
    stand_in()
    config = hf.Gemma2Config(**zoo.DECODER, head_dim=8)
    zoo.ZOO["gemma2"] = zoo.seeded(lambda: (hf.Gemma2ForCausalLM(config), zoo.language()))
    calls: dict[str, int] = collections.Counter()
    counting(calls)
    expected = results(family, spec, lean=False)
    unused = dict(calls)
    fused.DEVICES = ("cpu",)
    found = results(family, spec, lean=True)
    pairs = [(mine, theirs) for mine, theirs in zip(found, expected, strict=True) if theirs is not None]
    errors = [float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1)) for mine, theirs in pairs]  # type: ignore
    print(json.dumps({"error": max(errors), "tensors": len(errors), "calls": calls, "unused": unused}))


if __name__ == "__main__":
    main(*sys.argv[1:])
