"The learning-rate range test as arithmetic: which rates to try, when to stop, what to suggest."

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


class RangeTest:
    """Losses at rates that rise geometrically from `start` to `end` in `n_steps`: Smith, https://arxiv.org/abs/1506.01186.

    `diverged` after a loss that is not finite, or once the smoothed loss is over 4 times its best.
    """

    smoothing, steps = 0.9, 100

    def __init__(self, start: float = 1e-6, end: float = 10.0, n_steps: int = steps) -> None:
        self.planned = [start * (end / start) ** (i / max(1, n_steps - 1)) for i in range(n_steps)]
        self.losses: list[float] = []
        self.smoothed: list[float] = []
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
        before = self.smoothed[-1] if self.smoothed else loss
        weight = (1 - self.smoothing) / (1 - self.smoothing ** len(self.losses))
        self.smoothed.append(before + weight * (loss - before))  # in this form a constant loss stays constant
        self.diverged = self.smoothed[-1] > 4 * min(self.smoothed)


Suggest = Callable[[Sequence[float], Sequence[float]], float | None]


def minimum(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """A tenth of the rate where the loss is least; None if it never fell.

    The rule of the fastai book's chapter on pet breeds: at the minimum itself the loss has stopped falling.
    """
    best = min(range(len(losses)), key=losses.__getitem__, default=0)
    return lrs[best] / 10 if best else None


def steepest(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    "The rate where the loss falls fastest per factor of the rate; None if it never fell."
    falls = [losses[i - 1] - losses[i + 1] for i in range(1, len(losses) - 1)]
    best = max(range(len(falls)), key=falls.__getitem__, default=0)
    return lrs[best + 1] if falls and falls[best] > 0 else None


def valley(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate in the middle of the longest falling run of losses, gaps allowed; None if they never fell.

    The rule that fastai calls so (it is ESRI's): the longest decreasing subsequence finds the slope from plateau to
    minimum without being fooled by noise.
    """
    length, before = [1] * len(losses), [-1] * len(losses)
    for i in range(len(losses)):
        for j in range(i):
            if losses[j] > losses[i] and length[j] >= length[i]:
                length[i], before[i] = length[j] + 1, j
    last = first = max(range(len(losses)), key=length.__getitem__, default=0)
    if not losses or length[last] == 1:
        return None
    while before[first] >= 0:
        first = before[first]
    return lrs[(first + last) // 2]


def slide(lrs: Sequence[float], losses: Sequence[float], width: int = 15, threshold: float = 0.005) -> float | None:
    """The left end of an interval of `width` rates that slides down from the largest rate until its two ends slope
    alike (slopes per step within `threshold`); None where there are too few losses.

    fastai's interval slide rule, by Novetta.
    """
    around = [(max(i - 1, 0), min(i + 1, len(losses) - 1)) for i in range(len(losses))]
    slopes = [(losses[after] - losses[before]) / max(1, after - before) for before, after in around]
    for right in range(len(losses) - 1, width - 1, -1):
        if abs(slopes[right] - slopes[right - width]) <= threshold:
            return lrs[right - width]
    return None


SUGGESTIONS: dict[str, Suggest] = {rule.__name__: rule for rule in (minimum, steepest, valley, slide)}


def suggest(test: RangeTest) -> dict[str, float | None]:
    """What each rule says of the smoothed losses; `minimum` is the one that training goes on with.

    The first tenth of the rates is left out, as in fastai: the average of few losses moves more than they fall.
    """
    skip = len(test.planned) // 10
    return {name: rule(test.lrs[skip:], test.smoothed[skip:]) for name, rule in SUGGESTIONS.items()}
