"OneCycle: the learning rate of each step along one cycle."

from __future__ import annotations

from learner.learner import Callback
from learner.schedule import Anneal, linear, one_cycle


class OneCycle(Callback):
    "Sets the rate of each training step along `schedule.one_cycle` up to `base_lr`; keeps them in `lrs`."

    def __init__(self, base_lr: float, anneal: Anneal = linear) -> None:
        self.base_lr, self.anneal = base_lr, anneal
        self.lrs: list[float] = []

    def before_fit(self) -> None:
        "Forget the rates of an earlier fit."
        self.lrs = []

    def before_batch(self) -> None:
        "Set the rate of this step."
        if self.model.training:
            n = len(self.dls.train)
            lr = one_cycle((self.epoch * n + self.num) / (self.n_epochs * n), self.base_lr, self.anneal)
            self.opt.lr = lr
            self.lrs.append(lr)
