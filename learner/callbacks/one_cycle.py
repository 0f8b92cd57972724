"OneCycle: the learning rate of each step along one cycle."

from __future__ import annotations

from learner.learner import Callback
from learner.optimizer import Rate, spread
from learner.schedule import Anneal, linear, one_cycle


class OneCycle(Callback):
    """Sets the rate of each training step along `schedule.one_cycle` up to `base_lr`; keeps the last group's in `lrs`.

    A slice or a list gives each group of layers a peak of its own (see `optimizer.spread`).
    """

    def __init__(self, base_lr: Rate, anneal: Anneal = linear) -> None:
        self.base_lr, self.anneal = base_lr, anneal
        self.lrs: list[float] = []

    def before_fit(self) -> None:
        "Forget the rates of an earlier fit."
        self.lrs = []

    def before_batch(self) -> None:
        "Set the rate of this step."
        if self.model.training:
            n = len(self.dls.train)
            pct = (self.epoch * n + self.num) / (self.n_epochs * n)
            peaks = spread(self.base_lr, self.opt.n_layers)
            self.opt.set(lr=[one_cycle(pct, peak, self.anneal) for peak in peaks])
            self.lrs.append(self.opt.lr)
