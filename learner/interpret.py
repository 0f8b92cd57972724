"What a model made of each sample: its outcomes, the confusion among classes, and where it was most wrong."

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from learner.errors import UserError
from learner.losses import cross_entropy, log_softmax
from learner.metrics import count_pairs


@dataclass(frozen=True)
class Outcomes:
    """What a model made of n samples: a row of each tensor for every one of them.

    `samples` (n,) are their numbers in the dataset, `targets` and `predicted` (n,) class numbers, all int64, and
    `losses` (n,) float32 their cross entropy. `ranked` (n, k) int64 has the k likeliest classes from the likeliest on,
    `probabilities` (n, k) float32 those of them.
    """

    samples: Tensor
    targets: Tensor
    predicted: Tensor
    losses: Tensor
    ranked: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, samples: Tensor, k: int = 5) -> Self:
        "Those of a batch: `logits` (n, classes) float; `targets` and `samples` (n,) int64."
        ranked = logits.topk(min(k, logits.shape[1]), dim=1).indices
        probabilities = log_softmax(logits).exp().gather(1, ranked)
        losses = cross_entropy(logits, targets, "none")
        # argmax as in the metrics: among equals, topk may put another class first
        return cls(samples, targets, logits.argmax(1), losses, ranked, probabilities)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        "Those of several batches or ranks as one, by sample number, on the CPU; UserError if a sample occurs twice."
        joined = cls(*(torch.cat([getattr(part, one.name) for part in parts]).cpu() for one in fields(cls)))
        if len(joined.samples.unique()) < len(joined):
            raise UserError("a sample was counted twice: this is a bug, please report it")
        return joined.take(joined.samples.argsort())

    def take(self, which: Tensor) -> Self:
        "Those at the positions `which`, in their order."
        return type(self)(*(getattr(self, one.name)[which] for one in fields(self)))

    def __len__(self) -> int:
        return len(self.samples)

    def rates(self) -> dict[str, float]:
        """Loss, accuracy, top-5 accuracy (of the classes ranked) and error rate over all samples; NaN for none.

        A sample whose loss is no number has no prediction: it is wrong, as in the metrics.
        """
        known = ~self.losses.isnan()
        right = (self.predicted == self.targets) & known
        among_5 = (self.ranked[:, :5] == self.targets[:, None]).any(1) & known
        sums = {"loss": self.losses.double(), "accuracy": right, "top_5_accuracy": among_5, "error_rate": ~right}
        return {name: values.sum().item() / len(self) if len(self) else math.nan for name, values in sums.items()}

    def confusion(self, n_classes: int) -> Tensor:
        "How often each class (row) was taken for each (column), where there is a prediction: int64 (classes, classes)."
        known = ~self.losses.isnan()
        return count_pairs(self.targets[known], self.predicted[known], n_classes)

    def top_losses(self, n: int | None = None) -> Self:
        "The `n` samples with the largest losses (all if None), the largest first; one that is no number leads."
        return self.take(self.losses.argsort(descending=True, stable=True)[:n])


@dataclass(frozen=True)
class Confused:
    "How often a class was taken for another; both are class numbers."

    actual: int
    predicted: int
    count: int


def most_confused(confusion: Tensor, n: int | None = None) -> list[Confused]:
    "The `n` pairs (all if None) of different classes that were confused at all, the most frequent first."
    wrong = confusion.clone().fill_diagonal_(0)
    pairs = [Confused(actual, taken, int(wrong[actual, taken])) for actual, taken in wrong.nonzero().tolist()]
    return sorted(pairs, key=lambda pair: -pair.count)[:n]
