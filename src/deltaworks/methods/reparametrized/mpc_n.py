"""MPC-n: LoRA with a non-linearity between its two matrices.

Paper: See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of Decomposition, Si, Yang and Shen,
2024, arXiv:2407.05417, where it is the third pattern beside the two of MPC, and needs no penalty.

Formula: y = W x + b + s B relu(A x), A [r, in], B [out, r], s = alpha / r: a parallel adapter without biases.
Count: sum of r (in + out).
Departure: none; the published rows of MPC-n are those of the parallel adapter, whose relu stands here for h.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.forms import Tuner
from deltaworks.core.registry import method
from deltaworks.methods.reparametrized.lora import LoRATuner, LowRank


class NonlinearTuner(LoRATuner):
    """``s B relu(A x)``, which no weight can hold."""

    factors = Tuner.factors

    def around(self, base: Callable[[Any], Tensor], x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = F.relu(F.linear(dropped, self.A.to(x.dtype)))
        y = base(x)
        return y + (F.linear(inner, self.B.to(x.dtype)) * self.scale).to(y.dtype)


@method(
    "mpc-n",
    family="reparametrized/low-rank",
    paper="Si et al., 2024, arXiv:2407.05417",
    kinds=("linear", "conv1d"),
    tuner=NonlinearTuner,
    learning_rate=1e-2,
    tried=(1e-3, 3e-3, 1e-2),
)
class MPCN(LowRank):
    pass
