"""FISH Mask: train the few entries of all weights that carry the most Fisher information.

Paper: Training Neural Networks with Fixed Sparse Masks, Sung, Nair and Raffel, 2021, arXiv:2111.09839 (NeurIPS).

Formula: F_i = (1/N) sum over N examples of (d log p(y|x) / d w_i)^2, with the true labels (the empirical Fisher
information, their section 3.2); w' = w + v at the k entries with the largest F, ties by position; v [k] trained.
Count: k = floor(keep * N) of the N backbone parameters, tied ones counted once and the head left out.
Departure: the published code masks dense gradients; here only the k values exist, so that the optimizer's state is
2 k numbers and weight decay cannot reach what is masked. Dropout is off in the pass over the examples.
"""

from typing import Any

from deltaworks.core.anatomy import backbone
from deltaworks.core.calibration import squared_gradients
from deltaworks.core.delta import Delta
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.methods.selective.entries import Choosing, EntriesTuner


class FishProcedure(Choosing):
    """The pass over the examples, then nothing: the mask never changes."""

    samples = 0

    def begin(self, run: Run) -> None:
        if self.chosen:
            return  # loaded with its mask
        parameters = list(self.parameters().values())
        scores, self.samples = squared_gradients(self.delta.model, parameters, run, self.config.samples)
        self.choose(scores)

    def details(self) -> dict[str, Any]:
        return super().details() | {"fish_samples": self.samples}


@method(
    "fish",
    family="selective",
    paper="Sung et al., 2021, arXiv:2111.09839",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    tuner=EntriesTuner,
    learning_rate=1e-3,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "the entries of each adapter are others, so that switching compiles again"},
    small={"keep": 0.05},
)
class Fish(Config):
    targets: str = option("all", "which weights compete, never the output head's own")
    keep: float = option(0.005, "fraction of the backbone's parameters that are trained", least=0, most=1)
    samples: int = option(1024, "examples that estimate the Fisher information; few are enough", least=1)

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def tuner(self, site: Site) -> Tuner:
        return EntriesTuner(site)

    def procedure(self, delta: Delta) -> Procedure:
        return FishProcedure(delta, self)
