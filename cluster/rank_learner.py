"The Learner and the results of one rank, whose batch is a part of the global one."

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.comms import Comm
from cluster.reducer import GradientSum
from learner.callbacks.activations import ActivationStats
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.track import Metric
from learner.interpret import Outcomes
from learner.learner import Callback, Learner
from learner.metrics import accuracy

METRICS: dict[str, Metric] = {"accuracy": accuracy}
NAMES = ("count", "loss", *METRICS)  # what is summed over the samples of each global batch


class RankLearner(Learner):
    """A Learner whose loss is a sum over its samples, which the step divides by what all ranks' samples count for.

    It is driven from outside: callbacks hear of batches, of `before_fit`, `after_opt`, and between training and
    validation of `cleanup_epoch` and `before_epoch`, but of no other event of epochs and fits.
    """

    loss_func: Callable[..., Tensor]
    label_smoothing = 0.0
    class_weights: Tensor | None = None

    def get_loss(self) -> None:
        "`preds` and targets to the sum of losses; 0 for no samples. Only training smooths labels and weighs classes."
        special: tuple[Any, ...] = ()
        if self.model.training:
            special = self.label_smoothing, self.class_weights
        self.loss = self.loss_func(self.preds, self.batch[1], "sum", *special)

    def weight(self) -> Tensor | int:
        "What the batch counts for in the mean of losses: its samples, or their classes' weights where each has one."
        targets = self.batch[1]
        if self.class_weights is None or targets.is_floating_point():
            return len(targets)
        return self.class_weights[targets].sum()

    def take_kept(self) -> tuple[Outcomes | None, dict[int, dict[str, np.ndarray]]]:
        "What callbacks have kept for a report, and forget now: outcomes and activations."
        outcomes = [cb.take() for cb in self.cbs if isinstance(cb, KeepOutcomes)]
        activations = [cb.take() for cb in self.cbs if isinstance(cb, ActivationStats)]
        return (outcomes or [None])[0], (activations or [{}])[0]


class RankResults(Callback):
    """Sums `NAMES` over the samples of each global batch, of all ranks, and keeps them on the device.

    In training they go with the gradients (the reducer's tail): whoever did a step knows what it came to for all, also
    if another rank is gone a moment later. In validation, `share` adds all batches up at the end.
    """

    learner: RankLearner
    order = 20  # behind MixedPrecision, which gives predictions 32 bits

    def __init__(self, reducer: GradientSum) -> None:
        self.reducer = reducer
        self.reset()

    def reset(self) -> None:
        "Forget the batches so far."
        self.batches: list[Tensor] = []
        self.own, self.own_loss = 0, torch.zeros(())

    def after_loss(self) -> None:
        "Add up this batch, or part of one."
        preds, targets = self.preds.detach(), self.batch[1]
        metrics = [metric(preds, targets) for metric in METRICS.values()]
        loss = self.learner.loss.detach()
        self.own += len(targets)
        numbers = [loss.new_full((), len(targets)), loss, *(metric.to(loss.dtype) for metric in metrics)]
        if self.model.training:
            self.reducer.weight.add_(self.learner.weight())
            self.reducer.tail.add_(torch.stack(numbers))
            self.own_loss = self.reducer.tail[NAMES.index("loss")].clone()  # the tail is soon all ranks'
        else:
            self.batches.append(torch.stack(numbers).double())

    def after_step(self) -> None:
        "Keep what the step came to."
        self.batches.append(self.reducer.take_tail().double())

    def share(self, comm: Comm) -> None:
        "Add up all ranks' batches of a validation."
        total = torch.stack(self.batches)
        comm.sum_(total)
        comm.finish()
        self.batches = list(total)

    def columns(self) -> Mapping[str, list[float]]:
        "By name, the sums of each batch."
        rows = torch.stack(self.batches).T.tolist() if self.batches else [[] for _ in NAMES]
        return dict(zip(NAMES, rows))
