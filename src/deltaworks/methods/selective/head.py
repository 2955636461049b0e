"""Head only: the baseline that trains the output head on frozen features.

Paper: linear probes, Alain and Bengio, 2016, arXiv:1610.01644.

Formula: W' = V for the output head, with V a float32 master that starts at W.
Count: the parameters of the head.
Departure: none. A head that is tied to an embedding moves alone, so that the features stay frozen.
"""

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement, Tuner
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class HeadTuner(Replacement):
    """The head alone: an embedding that shares its weight keeps the features as they are."""

    tied = False


@method(
    "head",
    family="baseline",
    paper="Alain and Bengio, 2016, arXiv:1610.01644",
    kinds=("linear", "conv1d", "conv2d", "embedding", "norm", "parameters"),
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class Head(Config):
    targets: str = option("head", "the output head; head,pooler also trains the pooler that stands before it")

    def places(self, anatomy):  # type: ignore[no-untyped-def]
        if not any(place.role == "head" for place in anatomy.places):
            raise UserError(f"{anatomy.model} has no output head: load the model with one (...ForCausalLM, ...)")
        return super().places(anatomy)

    def tuner(self, site: Site) -> Tuner | None:
        return HeadTuner(site) if site.place.whole else None
