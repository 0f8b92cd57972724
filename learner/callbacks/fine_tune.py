"fine_tune: the head of a pretrained model first, then all of it at lower rates."

from __future__ import annotations

from learner.learner import Callback, Learner
from learner.optimizer import settable
from learner.schedule import fine_tuning


class FineTune(Callback):
    "Freezes all but the last layer group for `frozen_epochs`, and sets each step's rates: `schedule.fine_tuning`."

    def __init__(self, lr: float = 2e-3, frozen_epochs: int = 1) -> None:
        self.lr, self.frozen_epochs = lr, frozen_epochs

    def after_opt(self) -> None:
        "UserError for an optimizer of torch's."
        settable(self.opt)

    def before_epoch(self) -> None:
        "Freeze or unfreeze."
        if self.model.training:
            self.learner.freeze_to(-1 if self.epoch < self.frozen_epochs else 0)

    def before_batch(self) -> None:
        "Set the rates of this step."
        if self.model.training:
            n = len(self.dls.train)
            step = self.epoch * n + self.num
            self.opt.lr = fine_tuning(step, self.frozen_epochs * n, self.n_epochs * n, self.lr)


def fine_tune(learn: Learner, n_epochs: int, lr: float = 2e-3, frozen_epochs: int = 1) -> None:
    """Train the head alone for `frozen_epochs`, then all layers for `n_epochs`, with fastai's rates and defaults.

    `learn` needs a splitter, such as body_and_head; UserError without. A model for other classes gets its head by
    `groups.replace_head` first.
    """
    learn.freeze()  # refuses a learner of one group
    try:
        with learn.added(FineTune(lr, frozen_epochs)):
            learn.fit(frozen_epochs + n_epochs)
    finally:
        learn.unfreeze()
