"Accumulate: several batches, one step."

from __future__ import annotations

from collections.abc import Sequence

import torch

from learner.learner import Callback
from learner.module import Parameter
from learner.optimizer import settable


class Accumulate(Callback):
    """Take a step every `n_batches`, with the mean gradient over all their samples: as if they were one batch.

    Batches need not be of one size. What an epoch has left over at its end makes a smaller step. The loss is to be a
    mean over samples that all count alike: of weighted classes, each batch's weights would count as much.
    """

    order = -15  # before SetupLearner, which draws by rows

    def __init__(self, n_batches: int) -> None:
        self.n_batches, self.samples, self.complete = n_batches, 0, False

    def after_opt(self) -> None:
        "Have the optimizer divide the sums that have come together; UserError for one of torch's."
        settable(self.opt).then(self.divide)

    def before_batch(self) -> None:
        "Decide whether this batch takes the step, and where in the larger batch its samples stand."
        done = self.num + 1
        if self.model.training:
            self.learner.last_part = done % self.n_batches == 0 or done == len(self.dls.train)
            self.learner.rows = torch.arange(len(self.batch[1])) + self.samples

    def after_loss(self) -> None:
        "Turn the batch's mean loss into a sum, for backward alone."
        if self.model.training:
            self.samples += len(self.batch[1])
            self.learner.loss = self.loss * len(self.batch[1])

    def after_backward(self) -> None:
        "Turn the loss back into a mean."
        self.learner.loss = self.loss / len(self.batch[1])

    def after_batch(self) -> None:
        "Its gradients are there."
        self.complete = True

    def divide(self, params: Sequence[Parameter]) -> None:
        "Turn summed gradients into means, and count anew."
        for p in params:
            if p.grad is not None:
                p.grad.div_(self.samples)
        self.samples = 0

    def cleanup_batch(self) -> None:
        "A batch by itself is the whole one. One that was cancelled takes those before it along, which go into no step."
        self.learner.rows = None
        if self.last_part or not self.complete:
            self.cleanup_epoch()
        self.complete = False

    def cleanup_epoch(self) -> None:
        "Forget what came together for a step that the epoch, or the fit, has ended before."
        if self.samples:
            self.learner.zero_grad()
            self.samples = 0

    def cleanup_fit(self) -> None:
        "Let every batch take its step again; a fit may have ended before one, such as the LR finder's."
        self.learner.last_part = True
