"""What a model's outputs may lose by fine-tuning, as losses on logits [n, D] (D classes or words)."""

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 4096
"""Up to so many words the singular values of the logits are exact; beyond, those of a random sketch."""


def consistency(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over the rows."""
    student, teacher = (F.log_softmax(each / temperature, dim=-1) for each in (logits, teacher))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def covariance(logits: Tensor) -> Tensor:
    """1/D times the sum over i != j of Cov(logits)_ij^2; 0 for a single row, which has no covariance."""
    rows, classes = logits.shape
    if rows < 2:
        return logits.new_zeros(())
    centred = logits - logits.mean(0)
    squares = (centred.T @ centred / (rows - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / classes


def negative_entropy(logits: Tensor, words: int) -> Tensor:
    """Minus the mean entropy, in nats, of the softmax over the ``words`` largest logits of each row."""
    log_shares = F.log_softmax(logits.topk(min(words, logits.shape[1]), dim=-1).values, dim=-1)
    return (log_shares.exp() * log_shares).sum(-1).mean()


def spectrum(logits: Tensor, leading: int, *, frobenius: bool) -> Tensor:
    """Minus the ``leading`` singular values over the sum of all, or over the Frobenius norm; 0 for a single row."""
    rows, words = logits.shape
    if rows < 2:
        return logits.new_zeros(())
    sketched = words > EXACT and rows > leading + 5
    if sketched:  # the singular values within a subspace that holds the largest ones
        basis = torch.svd_lowrank(logits.detach(), q=leading + 5, niter=2)[0]  # [rows, k + 5]
        values = torch.linalg.svdvals(basis.T @ logits)
    else:
        values = torch.linalg.svdvals(logits)
    whole = torch.linalg.vector_norm(logits) if frobenius or sketched else values.sum()
    return -values[:leading].sum() / whole.clamp(min=torch.finfo(whole.dtype).tiny)
