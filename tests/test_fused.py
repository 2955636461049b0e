"""The kernels of liger-kernel in the place of neighbours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from deltaworks.core.lean import fused


def test_gates_are_told_by_their_values() -> None:
    assert fused.gate_of(nn.SiLU()) == "swiglu"
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        assert fused.gate_of(ACT2FN[name]) == "geglu"
    for name in ("gelu", "relu", "quick_gelu", "mish"):
        assert fused.gate_of(ACT2FN[name]) is None
    with torch.device("meta"):
        assert fused.gate_of(nn.SiLU()) == "swiglu"


def test_nothing_is_fused_without_a_gpu() -> None:
    x = torch.randn(2, 8)
    assert fused.rms_norm(x, torch.ones(8), 1e-6, 0.0) is None
    assert fused.gated("swiglu", x) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "spec", "norms", "gate"),
    [
        ("llama", "lora[rank=2]", 7, "swiglu"),  # a norm whose input needs no gradient is not one of them
        ("llama", "lora[rank=2,dora=true]", 7, "swiglu"),  # keeps what the gate multiplies
        ("llama", "houlsby[width=4]", 4, "swiglu"),
        ("gemma2", "oft[block=4]", 8, "geglu"),
        ("t5-gated", "lora[rank=2]", 19, "geglu"),
    ],
)
def test_kernels_give_the_gradients_of_torch(family: str, spec: str, norms: int, gate: str) -> None:
    pytest.importorskip("liger_kernel")
    script = Path(__file__).parent / "interpreted.py"
    done = subprocess.run([sys.executable, script, family, spec], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["error"] < 1e-5
    assert not found["unused"]
    assert found["calls"]["LigerRMSNormFunction"] == norms
    assert found["calls"][f"{gate}_backward"] > 0
