"Metrics as sums and counts, so that those of several batches or devices merge exactly."

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from learner.errors import UserError

Sums = dict[str, tuple[float, float]]


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    "How many of `targets` (n,) int64 have the largest of `preds` (n, classes): a sum, to be divided by a count later."
    return (preds.argmax(1) == targets).sum()


def merge(parts: Iterable[Sums]) -> Sums:
    "Add sums and counts key by key; UserError if the parts differ in their keys, since an average of some would lie."
    parts = list(parts)
    for part in parts:
        if part.keys() != parts[0].keys():
            raise UserError(f"results differ in their keys: {sorted(parts[0])} and {sorted(part)}")
    return {key: (sum(p[key][0] for p in parts), sum(p[key][1] for p in parts)) for key in (parts[0] if parts else ())}


def means(sums: Sums) -> dict[str, float]:
    "Each sum over its count; NaN where nothing was counted."
    return {key: total / count if count else float("nan") for key, (total, count) in sums.items()}
