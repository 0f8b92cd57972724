"Metrics as sums and counts, so that those of several batches or devices merge exactly."

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sums = dict[str, tuple[float, float]]


def hard(targets: Tensor) -> Tensor:
    "Class numbers (n,) int64, of probabilities (n, classes) float the likeliest."
    return targets.argmax(1) if targets.is_floating_point() else targets


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """How many of `targets` (n,) int64 have the largest of `preds` (n, classes): a sum, to be divided by a count later.

    A row whose largest is no finite number is wrong, whatever the target.
    """
    best = preds.max(1)
    return ((best.indices == hard(targets)) & best.values.isfinite()).sum()


def error_rate(preds: Tensor, targets: Tensor) -> Tensor:
    "How many of `targets` have not the largest of `preds`: a sum."
    return len(targets) - accuracy(preds, targets)


def top_k(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    "A metric: how many of `targets` are among the `k` largest of `preds` (all classes where there are fewer)."

    def metric(preds: Tensor, targets: Tensor) -> Tensor:
        best = preds.topk(min(k, preds.shape[1]), dim=1)
        found = (best.indices == hard(targets).unsqueeze(1)).any(1)
        return (found & best.values[:, 0].isfinite()).sum()

    metric.__name__ = f"top_{k}_accuracy"
    return metric


def confusion(preds: Tensor, targets: Tensor) -> Tensor:
    "How often each class (row) was taken for each (column): int64 (classes, classes); those of batches add up."
    return count_pairs(targets, preds.argmax(1), preds.shape[1])


def count_pairs(targets: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    "As `confusion`, from the predicted class numbers (n,) int64."
    return torch.bincount(targets * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)


def per_class(confused: Tensor) -> dict[str, Tensor]:
    """Precision, recall, F1 (float64) and support (int64) of each class, (classes,), from a confusion matrix.

    A class that was never predicted has precision 0; one that never occurs has recall 0.
    """
    right, predicted, support = confused.diagonal().double(), confused.sum(0), confused.sum(1)
    precision = right / predicted.clamp(min=1)
    recall = right / support.clamp(min=1)
    f1 = 2 * right / (predicted + support).clamp(min=1)
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def means(sums: Sums) -> dict[str, float]:
    "Each sum over its count; NaN where nothing was counted."
    return {key: total / count if count else float("nan") for key, (total, count) in sums.items()}
