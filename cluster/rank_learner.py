"The Learner and the results of one rank, whose batch is a part of the global one."

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from learner.callbacks.activations import ActivationStats
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.track import TrackResults
from learner.interpret import Outcomes
from learner.learner import Learner
from learner.losses import cross_entropy


class RankLearner(Learner):
    """A Learner whose loss is a sum over its samples, which the step divides by the number of all ranks' samples.

    A batch may come in parts; `first_part` and `last_part` say where this one stands.
    """

    label_smoothing = 0.0
    class_weights: Tensor | None = None  # on the CPU, where targets are counted
    first_part = True

    def get_loss(self) -> None:
        "`preds` and targets to the sum of losses; 0 for no samples. Only training smooths labels and weighs classes."
        special: tuple[Any, ...] = ()
        if self.model.training:
            weights = self.class_weights
            special = self.label_smoothing, None if weights is None else weights.to(self.preds.device)
        self.loss = cross_entropy(self.preds, self.batch[1], "sum", *special)

    def weigh(self, targets: Tensor) -> float:
        "What these samples (class numbers int64) count for in the mean of losses: one each, or their classes' weights."
        return len(targets) if self.class_weights is None else float(self.class_weights[targets].sum())

    def take_kept(self) -> tuple[Outcomes | None, dict[int, dict[str, np.ndarray]]]:
        "What callbacks have kept for a report, and forget now: outcomes and activations."
        outcomes = [cb.take() for cb in self.cbs if isinstance(cb, KeepOutcomes)]
        activations = [cb.take() for cb in self.cbs if isinstance(cb, ActivationStats)]
        return (outcomes or [None])[0], (activations or [{}])[0]

    def loss_total(self) -> Tensor:
        "The sum that the loss already is."
        return self.loss.detach()


class RankResults(TrackResults):
    "TrackResults that leaves averages and tables to the driver, which has all ranks' sums."

    learner: RankLearner

    def before_fit(self) -> None:
        "No table here."

    def before_epoch(self) -> None:
        "Sums are per chunk here."

    def after_batch(self) -> None:
        "Note a batch, or add a further part to the batch that it belongs to."
        super().after_batch()
        if not self.learner.first_part:
            columns: list[list[Any]] = [self.losses, self.ns, *self.sums.values()]
            for column in columns:
                last = column.pop()
                column[-1] = column[-1] + last

    def after_epoch(self) -> None:
        "No averages here."
