"Losses, from logsumexp up, stable for logits of any size."

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_CLASS = -(2**63)  # torch leaves out targets of this number: none has it, so that a wrong one raises an error


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """log(sum(exp(x))) along `dim`, which is dropped: (..., n) float -> (...).

    The largest value is taken out of the exponential, so that nothing overflows; a largest value that is infinite is
    left in, because inf - inf would be NaN.
    """
    largest = _largest(x, dim)
    return (x - largest).exp().sum(dim).log() + largest.squeeze(dim)


def _largest(x: Tensor, dim: int) -> Tensor:
    largest = x.detach().amax(dim, keepdim=True)
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of the softmax along `dim`; same shape as `x` (float).

    The largest value is taken out first: subtracted from the large `x`, a small logarithm would be rounded away.
    """
    shifted = x - _largest(x, dim)
    return shifted - logsumexp(shifted, dim).unsqueeze(dim)


def nll(log_probs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log likelihood of `targets` (n,) int64 under `log_probs` (n, classes) float.

    `reduction` is mean (a scalar; NaN for no samples), sum (a scalar; 0 for no samples) or none (n,).
    """
    losses = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return reduce(losses, reduction)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of `logits` (n, classes) float with class numbers (n,) int64 or probabilities (n, classes) float.

    `label_smoothing` e moves e of each target to all classes evenly (Szegedy et al., https://arxiv.org/abs/1512.00567);
    `weight` (classes,) counts each class's samples as that many, in the mean too; but a mean over probabilities is one
    over samples, as torch's. Otherwise `reduction` is as in nll.
    """
    if targets.is_floating_point():
        return reduce(_soft_losses(logits, targets, label_smoothing, weight), reduction)
    counts = None if weight is None else weight.to(logits.dtype)
    # nll(log_softmax(logits), targets), smoothed and weighted, by torch's kernels: 0.2 to 0.7 of the time of our own
    losses = F.cross_entropy(
        logits, targets, counts, reduction="none", ignore_index=NO_CLASS, label_smoothing=label_smoothing
    )
    if weight is not None and reduction == "mean":
        return losses.sum() / weight[targets].sum()
    return reduce(losses, reduction)


def balanced(targets: Sequence[int], n_classes: int) -> tuple[float, ...]:
    """Class weights in inverse proportion to how often each occurs in `targets`, 1 on average over these.

    For `cross_entropy`; a class that never occurs has weight 0.
    """
    counts = Counter(targets)
    return tuple(len(targets) / (len(counts) * counts[c]) if counts[c] else 0.0 for c in range(n_classes))


def _soft_losses(logits: Tensor, targets: Tensor, smoothing: float, weight: Tensor | None) -> Tensor:
    shares = targets * (1 - smoothing) + smoothing / logits.shape[1]
    if weight is not None:
        shares = shares * weight
    terms = F.log_softmax(logits, 1) * shares
    # where a share is 0 its class says nothing, although its log probability may be -inf: torch's own loss is NaN then
    return -torch.where(shares == 0, 0.0, terms).sum(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    "Cross entropy of sigmoid(`logits`) against `targets` in [0, 1], same shape, float; stable for any logit."
    losses = logits.clamp(min=0) - logits * targets + (-logits.abs()).exp().log1p()
    return reduce(losses, reduction)


def digit_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    "The digit chapter's own loss: how far sigmoid(`logits`) is from the right end, for `targets` 0 or 1, same shape."
    probs = logits.sigmoid()
    return reduce(torch.where(targets == 1, 1 - probs, probs), reduction)


def mse(preds: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    "Squared differences; same shape, float."
    return reduce((preds - targets).square(), reduction)


def l1(preds: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    "Absolute differences; same shape, float."
    return reduce((preds - targets).abs(), reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    "Mean, sum or none of the samples' losses (n,); raises ValueError for another word."
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    raise ValueError(f"reduction={reduction!r} is unknown; known are 'mean', 'sum' and 'none'")
