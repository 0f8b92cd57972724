"The learning-rate range test as arithmetic: which rates to try, when to stop, what to suggest."

from __future__ import annotations

import math


class RangeTest:
    """Losses at rates that rise geometrically from `start` to `end` in `n_steps`: Smith, https://arxiv.org/abs/1506.01186.

    `diverged` after a loss that is not finite, or once the smoothed loss is over 4 times its best.
    """

    smoothing = 0.9

    def __init__(self, start: float = 1e-6, end: float = 10.0, n_steps: int = 100) -> None:
        self.planned = [start * (end / start) ** (i / (n_steps - 1)) for i in range(n_steps)]
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._average = 0.0
        self.diverged = False

    @property
    def lrs(self) -> list[float]:
        "The rates whose losses are known."
        return self.planned[: len(self.losses)]

    @property
    def finished(self) -> bool:
        "Whether the test is over."
        return self.diverged or len(self.losses) == len(self.planned)

    def add(self, loss: float) -> None:
        "Take the loss at the next rate."
        if not math.isfinite(loss):
            self.diverged = True
            return
        self.losses.append(loss)
        self._average = self.smoothing * self._average + (1 - self.smoothing) * loss
        self.smoothed.append(self._average / (1 - self.smoothing ** len(self.losses)))
        self.diverged = self.smoothed[-1] > 4 * min(self.smoothed)


def suggest(test: RangeTest) -> float | None:
    """A rate to train at: a tenth of the one where the smoothed loss is least; None if it never fell.

    The rule of the fastai book's chapter on pet breeds. At the minimum itself the loss has stopped falling.
    """
    best = min(range(len(test.smoothed)), key=test.smoothed.__getitem__, default=0)
    return test.lrs[best] / 10 if best else None
