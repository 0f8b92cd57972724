"OneCycle: the learning rate of each step along one cycle."

from __future__ import annotations

from typing import Any

from learner.learner import Callback
from learner.optimizer import Rate, settable, spread
from learner.schedule import one_cycle, one_cycle_momentum


class OneCycle(Callback):
    """Sets the rate of each training step along `schedule.one_cycle` up to `base_lr`; keeps the last group's in `lrs`.

    `shape` is the cycle's: anneal, pct_start, div, div_final; with `moms`, momentum goes the other way.
    A slice or a list gives each group of layers a peak of its own (see `optimizer.spread`).
    """

    def __init__(self, base_lr: Rate, moms: tuple[float, float, float] | None = None, **shape: Any) -> None:
        self.base_lr, self.moms, self.shape = base_lr, moms, shape
        self.lrs: list[float] = []

    def before_fit(self) -> None:
        "Forget the rates of an earlier fit."
        self.lrs = []

    def after_opt(self) -> None:
        "UserError for an optimizer of torch's."
        settable(self.opt)

    def before_batch(self) -> None:
        "Set the rate of this step."
        if self.model.training:
            n = len(self.dls.train)
            pct = (self.epoch * n + self.num) / (self.n_epochs * n)
            peaks = spread(self.base_lr, self.opt.n_layers)
            self.opt.set(lr=[one_cycle(pct, peak, **self.shape) for peak in peaks])
            if self.moms is not None:
                shared = {name: self.shape[name] for name in ("anneal", "pct_start") if name in self.shape}
                self.opt.set(momentum=one_cycle_momentum(pct, self.moms, **shared))
            self.lrs.append(self.opt.lr)
