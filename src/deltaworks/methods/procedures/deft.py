"""DEFT: an extra loss on top of another method that teaches the feed-forward layers to switch neurons off.

Paper: From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers, Runwal et al.,
2024, arXiv:2402.01911 (AAAI 2025).

Formula: O [batch, T, m] is what the second matrix of a feed-forward layer reads, D(O) the mean over the tokens that are
no padding and over m of O^2 / (O^2 + eps); the loss gains w times the mean of D over samples and layers, for each stack
(encoder, decoder) of its own. The density that it stands for is the share of O that is not 0.
Count: that of the method below.
Departure: O is read where W2 reads it, so that in gated layers it is the product, whose zeros save the same rows of W2
(the published code: the gate's branch); padding, which the published code counts, is masked; the weight holds for
every stack.
"""

from deltaworks.core.delta import Delta
from deltaworks.core.procedure import Procedure
from deltaworks.core.registry import OnTop, method, option
from deltaworks.methods.procedures.density import Density


@method(
    "deft",
    family="procedures",
    paper="Runwal et al., 2024, arXiv:2402.01911",
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
)
class DEFT(OnTop):
    weight: float = option(1.0, "w, the weight of the density of each stack", least=0)
    eps: float = option(1e-7, "smoothing: entries well below its root count as zeros", least=1e-12)
    threshold: float = option(0.0, "entries up to this size count as zeros in the record", least=0)

    def procedure(self, delta: Delta) -> Procedure:
        return Density(delta, self)
