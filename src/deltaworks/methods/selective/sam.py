"""SAM: train the entries of every tensor that a second-order approximation of the loss would gain most from.

Paper: On the Effectiveness of Parameter-Efficient Fine-Tuning, Fu et al., 2022, arXiv:2211.15583 (AAAI 2023): the
Second-order Approximation Method, not sharpness-aware minimisation.

Formula: L(w + M d) = L(w) + g^T M d + (M d)^T H (M d) / 2 with M diagonal, 0 or 1. For diagonal H the best entry
i gains g_i^2 / (2 h_i) (theorem 3); H is unknown and taken as constant, so the largest g_i^2 stay. g is the sum of
the gradients of T batches at the pretrained weights; w' = w + v at the kept entries, v trained.
Count: the sum over the tensors of max(1, floor(keep n)) (RoBERTa-base's 85M of the encoder at 0.5 %: 425,160);
each is stored with its position, 5 to 6 bytes.
Departure: the text ranks all entries together while the published code, which made its numbers, ranks each tensor by
itself: that is the default here and compete=model the text's; dropout is off in the pass, and weight decay cannot
reach what is masked.
"""

from typing import Any

from torch import Tensor

from deltaworks.core.anatomy import backbone
from deltaworks.core.calibration import summed_gradients
from deltaworks.core.delta import Delta
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import Choosing, EntriesTuner, largest


def gain(gradient: Tensor, curvature: Tensor | float = 1.0) -> Tensor:
    """How much of the loss the best step of each entry alone takes away: g^2 / (2 h) (theorem 3)."""
    return gradient.square() / (2 * curvature)


class SAMProcedure(Choosing):
    """The burn-in, in which nothing moves, then nothing: the mask never changes."""

    burned = 0

    def begin(self, run: Run) -> None:
        if self.chosen:
            return  # loaded with its mask
        parameters = list(self.parameters().values())
        gradients, self.burned = summed_gradients(self.delta.model, parameters, run, self.config.burn_in)
        gains = [gain(gradient) for gradient in gradients]
        if self.config.compete == "model":
            self.choose(gains)
        else:
            self.take([largest(each.flatten(), self.share(each.numel())) for each in gains])

    def share(self, size: int) -> int:
        """How many of a tensor's entries stay: at least one, so that no tiny tensor is left out."""
        return max(1, int(self.config.keep * size))

    def details(self) -> dict[str, Any]:
        return super().details() | {"sam_batches": self.burned}


@method(
    "sam",
    family="selective",
    paper="Fu et al., 2022, arXiv:2211.15583",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=EntriesTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "the entries of each adapter are others, so that switching compiles again"},
    small={"keep": 0.05},
)
class SAM(Config):
    targets: str = option("all", "whose entries are trained, never the output head's; the paper: the whole encoder")
    keep: float = option(0.005, "fraction of the entries that are trained", least=0, most=1)
    compete: str = option(
        "tensor", "which entries compete: those of one tensor or of the model", choices=("tensor", "model")
    )
    burn_in: int = option(600, "batches whose gradients are summed before the first step", least=1)

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def tuner(self, site: Site) -> Tuner:
        return EntriesTuner(site)

    def procedure(self, delta: Delta) -> Procedure:
        return SAMProcedure(delta, self)
