"Losses, from logsumexp up, stable for logits of any size."

from __future__ import annotations

import torch
from torch import Tensor


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """log(sum(exp(x))) along `dim`, which is dropped: (..., n) float -> (...).

    The largest value is taken out of the exponential, so that nothing overflows; a largest value that is infinite is
    left in, because inf - inf would be NaN.
    """
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    return (x - largest).exp().sum(dim).log() + largest.squeeze(dim)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    "Logarithm of the softmax along `dim`; same shape as `x` (float)."
    return x - logsumexp(x, dim).unsqueeze(dim)


def nll(log_probs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log likelihood of `targets` (n,) int64 under `log_probs` (n, classes) float.

    `reduction` is mean (a scalar; NaN for no samples), sum (a scalar; 0 for no samples) or none (n,).
    """
    losses = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return reduce(losses, reduction)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    "Cross entropy of `logits` (n, classes) float against class numbers `targets` (n,) int64; `reduction` as in nll."
    return nll(log_softmax(logits), targets, reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    "Mean, sum or none of the samples' losses (n,); raises ValueError for another word."
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    raise ValueError(f"reduction={reduction!r} is unknown; known are 'mean', 'sum' and 'none'")
