"""S2-LoRA: one pair of low-rank factors for all weights of a shape; each weight owns sparse coefficients of its ranks.

Paper: Sparsely Shared LoRA on Whisper for Child Speech Recognition, Liu et al., 2023, arXiv:2309.11756 (ICASSP).
Reconstructed from its abstract: the paper's own settings and code could not be read.

Formula: W' = W + s B diag(e) A, with A [r, in], B [out, r] shared by all weights of shape (out, in), e [r] of each
weight, s = alpha / r. The loss gains ``penalty`` times the mean |e| over all weights; or, with ``shrink``, each step
ends by soft-thresholding, e <- sign(e) max(|e| - shrink, 0). At the end |e| below ``threshold`` becomes 0.
Start: A, B ~ N(0, 0.02^2), e = 0; or, with zero = "B", B = 0, e = 1.
Count: sum over shapes of r (in + out), and r for each weight.
Departure: rows of A and columns of B have norm 1 before use, since growing them would make every |e| small for free.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner
from deltaworks.core.history import History
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class S2LoRATuner(Tuner):
    """The shared A [r, in] and B [out, r], and the coefficients e [r] of one weight."""

    decays = False  # the penalty on e is its decay, and the norms of A and B do not count

    def __init__(self, site: Site, config: "S2LoRA") -> None:
        super().__init__()
        site.check_rank(config.rank)
        (out, inner), rank = site.shape, config.rank
        starts = {"e": lambda: site.normal(out, rank, std=0.02), "B": lambda: site.zeros(out, rank)}
        key = ("s2-lora", site.member, out, inner)
        self.A = site.shared((*key, "A"), lambda: site.normal(rank, inner, std=0.02))
        self.B = site.shared((*key, "B"), starts[config.zero])
        self.e = site.zeros(rank) if config.zero == "e" else site.ones(rank)
        self.scale, self.unit = config.alpha / rank, config.unit  # type: ignore[operator]
        self.rates = {"A": config.ratio, "B": config.ratio}

    def factors(self) -> Factors:
        A, B = (F.normalize(self.A, dim=1), F.normalize(self.B, dim=0)) if self.unit else (self.A, self.B)
        return Factors(self.e[:, None] * A, B, self.scale)


class SparseProcedure(Procedure):
    """Keeps the coefficients small while training, counts those in use, and drops the rest at the end."""

    def __init__(self, delta: Any, config: "S2LoRA") -> None:
        super().__init__(delta)
        self.config, self.step, self.steps = config, 0, 0
        self.owners: dict[str, Any] = {item.key: item.tuner for item in delta.attached if item.tuner.config is config}
        self.history = History()  # of ranks in use

    @property
    def coefficients(self) -> list[nn.Parameter]:
        return [tuner.e for tuner in self.owners.values()]

    def begin(self, run: Run) -> None:
        self.steps = run.steps

    def loss(self, loss: Tensor) -> Tensor:
        if self.config.shrink:
            return loss
        # the gradient of |e| at 0 is 0, so that coefficients can leave it
        return loss + self.config.penalty * torch.cat([e.to(loss.device) for e in self.coefficients]).abs().mean()

    @torch.no_grad()
    def stepped(self) -> None:
        self.step += 1
        if self.config.shrink:
            for e in self.coefficients:
                e.copy_(F.softshrink(e, self.config.shrink))
        if self.history.due(self.step, self.steps):
            self.history.note(self.step, dict(zip(self.owners, self.ranks(), strict=True)))

    def ranks(self) -> list[int]:
        """The effective rank of each weight: how many of its coefficients are above the threshold."""
        return [int((e.detach().abs() > self.config.threshold).sum()) for e in self.coefficients]

    @torch.no_grad()
    def end(self) -> None:
        for e in self.coefficients:
            e.mul_(e.abs() > self.config.threshold)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.history = int(state["step"]), History(state["history"])

    def details(self) -> dict[str, Any]:
        return {"s2_lora_rank": self.history.data}


@method(
    "s2-lora",
    family="reparametrized/low-rank",
    paper="Liu et al., 2023, arXiv:2309.11756",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=S2LoRATuner,
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
    small={"rank": 4},
)
class S2LoRA(Config):
    targets: str = option("attention", "the paper, as read here: attention,cross_attention")
    rank: int = option(32, "rank r of the shared factors", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    penalty: float = option(1e-3, "weight of the mean |e| in the loss", least=0)
    shrink: float = option(0.0, "taken off every |e| after each step, in place of the penalty", least=0)
    threshold: float = option(1e-3, "|e| up to which a rank is dropped at the end", least=0)
    zero: str = option("e", "which of e and B starts at 0", choices=("e", "B"))
    unit: bool = option(True, "norm 1 for the rows of A and the columns of B")
    ratio: float = option(1.0, "learning rate of A and B over that of e", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero == "B" and self.unit:
            raise UserError("s2-lora: columns of norm 1 cannot start at zero: with zero=B give unit=false")

    def procedure(self, delta: Any) -> Procedure:
        return SparseProcedure(delta, self)
