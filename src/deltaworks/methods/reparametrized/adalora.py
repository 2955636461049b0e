"""AdaLoRA: low-rank changes in SVD form whose ranks share one budget and move to where they matter.

Paper: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, Zhang et al., 2023, arXiv:2303.10512 (ICLR).
Formula: W' = W + s P diag(L) Q, with P [out, r], L [r], Q [r, in], s = alpha / rank; the loss gains gamma times the
mean over all P and Q of ||P^T P - I||_F and ||Q Q^T - I||_F. Importance of an entry w with gradient g: I = |w g|;
Ibar <- beta Ibar + (1 - beta) I; Ubar <- beta Ubar + (1 - beta) |I - Ibar|; s(w) = Ibar Ubar. Of triplet i: S = s(L_i)
+ mean_j s(P_ji) + mean_j s(Q_ij). Budget: b0 up to step t_i; bT + (b0 - bT) (1 - (t - t_i) / (T - t_i - t_f))^3; bT in
the last t_f steps. The b(t) triplets of the largest S over all matrices stay; the others get L = 0 and train on.
Count: r (in + out + 1) for each weight while training, with r of the start; that of the kept triplets afterwards.
Departure: s is constant, while the published code divides by the mean rank that is left (which its update absorbs).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tuner, nonzero
from deltaworks.core.history import History
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site


class AdaLoRATuner(Tuner):
    """The triplets P [out, r], L [r], Q [r, in] of one weight; those with L = 0 are not stored."""

    def __init__(self, site: Site, config: "AdaLoRA") -> None:
        super().__init__()
        site.check_rank(config.start)
        self.P, self.L = site.normal(site.shape[0], config.start, std=0.02), site.zeros(config.start)
        self.Q = site.normal(config.start, site.shape[1], std=0.02)
        self.scale = config.alpha / config.rank  # type: ignore[operator]

    def factors(self) -> Factors:
        return Factors(self.L[:, None] * self.Q, self.P, self.scale)

    def penalty(self) -> Tensor:
        """||P^T P - I||_F + ||Q Q^T - I||_F (equation 4; as the published code has it, not squared)."""
        eye = torch.eye(len(self.L), device=self.L.device)
        return torch.linalg.matrix_norm(self.P.T @ self.P - eye) + torch.linalg.matrix_norm(self.Q @ self.Q.T - eye)

    def stored(self) -> dict[str, Tensor]:
        kept = nonzero(self.L.detach())
        return {"P": self.P.detach()[:, kept], "L": self.L.detach()[kept], "Q": self.Q.detach()[kept]}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take any number of triplets up to r; the others get L = 0 and keep their P and Q."""
        (out, most), inner, rank = self.P.shape, self.Q.shape[1], len(tensors.get("L", ()))
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"P": [out, rank], "L": [rank], "Q": [rank, inner]} or rank > most:
            raise UserError(f"P [{out}, r], L [r], Q [r, {inner}] with r <= {most} are needed, not {shapes}")
        self.P[:, :rank], self.Q[:rank], self.L.zero_()[:rank] = tensors["P"], tensors["Q"], tensors["L"]


class BudgetProcedure(Procedure):
    """Scores every entry after each step and masks what the budget leaves no room for."""

    def __init__(self, delta: Any, config: "AdaLoRA") -> None:
        super().__init__(delta)
        self.config, self.history, self.step, self.steps, self.warmup, self.final = config, History(), 0, 0, 0, 0
        self.tuners: dict[str, Any] = {item.key: item.tuner for item in delta.attached if item.tuner.config is config}
        self.entries = {f"{key}.{name}": p for key, t in self.tuners.items() for name, p in t.named_parameters()}
        self.scores: dict[str, Tensor] = {}  # by the names of ``entries``: Ibar and Ubar, [2, *shape]

    def begin(self, run: Run) -> None:
        self.steps, shares = run.steps, (self.config.warmup, self.config.final)
        self.warmup, self.final = (int(share if share >= 1 else share * run.steps) for share in shares)
        if run.steps <= self.warmup + self.final:
            raise UserError(f"adalora: warmup={self.warmup}, final={self.final} take all {run.steps} steps: give less")
        self.scores = {name: entry.new_zeros(2, *entry.shape) for name, entry in self.entries.items()} | self.scores

    def budget(self, step: int) -> int:
        """How many triplets may stay after ``step`` (equation 11)."""
        first, last = (rank * len(self.tuners) for rank in (self.config.start, self.config.rank))
        left = 1 - (step - self.warmup) / (self.steps - self.warmup - self.final)
        return int(last + (first - last) * min(max(left, 0.0), 1.0) ** 3)

    def loss(self, loss: Tensor) -> Tensor:
        penalty = sum(tuner.penalty().to(loss.device) for tuner in self.tuners.values())
        return loss + self.config.gamma * penalty / (2 * len(self.tuners))

    @torch.no_grad()
    def stepped(self) -> None:
        step = self.step = self.step + 1
        scores = {name: self._score(name, entry) for name, entry in self.entries.items()}
        if step >= self.steps - self.final or (step > self.warmup and step % self.config.interval == 0):
            triplets = [scores[f"{key}.L"] + scores[f"{key}.P"] + scores[f"{key}.Q"] for key in self.tuners]
            self.mask(torch.stack([triplet.cpu() for triplet in triplets]), self.budget(step))
        if self.history.due(step, self.steps):
            self.history.note(step, {key: int(tuner.L.count_nonzero()) for key, tuner in self.tuners.items()})

    def _score(self, name: str, entry: Tensor) -> Tensor:
        """The part [r] of S, after the moving averages have taken in the gradient (equations 8 to 10)."""
        sensitivity = torch.zeros_like(entry) if entry.grad is None else (entry * entry.grad).abs()
        average, uncertainty = self.scores[name]
        average.lerp_(sensitivity, 1 - self.config.beta)
        uncertainty.lerp_((sensitivity - average).abs(), 1 - self.config.beta)
        score = average * uncertainty
        return score if entry.dim() == 1 else score.mean(dim=0 if name.endswith("P") else 1)

    def mask(self, scores: Tensor, budget: int) -> None:
        """Keep the triplets of the ``budget`` largest ``scores`` [matrices, r]; L becomes 0 for the others."""
        keep = torch.zeros(scores.numel()).index_fill(0, scores.flatten().topk(budget).indices, 1.0)
        for tuner, kept in zip(self.tuners.values(), keep.view_as(scores), strict=True):
            tuner.L.data.mul_(kept.to(tuner.L.device))

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self.scores, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.history = state["step"], History(state["history"])
        for name, score in state["scores"].items():
            if name not in self.entries or score.shape[1:] != self.entries[name].shape:
                raise UserError(f"the scores {name!r} of shape {list(score.shape)} fit no matrix of this adapter")
            self.scores[name] = score.to(self.entries[name].device, copy=True)

    def details(self) -> dict[str, Any]:
        return {"adalora_rank": self.history.data}


@method(
    "adalora",
    family="reparametrized/low-rank",
    paper="Zhang et al., 2023, arXiv:2303.10512",
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    tuner=AdaLoRATuner,
    learning_rate=1e-2,
    tried=(3e-3, 1e-2, 3e-2),
)
class AdaLoRA(Config):
    targets: str = option("linear", "the paper: all six matrices of every block")
    rank: int = option(8, "mean rank bT / n that is left at the end", least=1)
    initial: float = option(1.5, "b0 / bT, the rank of every matrix at the start as a multiple of ``rank``", least=1)
    alpha: float | None = option(None, "scale: s = alpha / rank; default: the rank, so s = 1", least=0)
    warmup: float = option(0.1, "t_i, steps before pruning; below 1 a share of the run", least=0)
    final: float = option(0.5, "t_f, steps with the final budget; below 1 a share of the run", least=0)
    interval: int = option(10, "steps between two prunings", least=1)
    gamma: float = option(0.1, "weight of the orthogonality loss", least=0)
    beta: float = option(0.85, "b1 = b2 of the moving averages", least=0, most=1)

    @property
    def start(self) -> int:
        return round(self.initial * self.rank)

    def procedure(self, delta: Any) -> Procedure:
        return BudgetProcedure(delta, self)
