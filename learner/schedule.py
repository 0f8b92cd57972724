"Schedules: pure functions of progress, the fraction of all steps that are done, in [0, 1)."

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

from learner.errors import UsageError

Schedule = Callable[[float], float]
Anneal = Callable[[float, float, float], float]


# Pieces: from `start` to `end` as `pct` goes from 0 to 1.


def constant(start: float, end: float, pct: float) -> float:
    "Stay at `start`."
    return start


def linear(start: float, end: float, pct: float) -> float:
    "A straight line."
    return (1 - pct) * start + pct * end


def cosine(start: float, end: float, pct: float) -> float:
    "Half a cosine: slow, fast, slow (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983)."
    return end + (start - end) * (1 + math.cos(math.pi * pct)) / 2


def exponential(start: float, end: float, pct: float) -> float:
    "A constant factor per step; both ends must be above 0."
    return start * (end / start) ** pct


def polynomial(start: float, end: float, pct: float, power: float = 2.0) -> float:
    "A power of progress: fast at the end for a power above 1."
    return start + (end - start) * pct**power


# Whole schedules.


def combine(fractions: Sequence[float], schedules: Sequence[Schedule]) -> Schedule:
    """Run `schedules` one after the other, each over its fraction of the whole; each sees progress from 0 to 1.

    Raises UsageError if the fractions are not as many, not positive or do not sum to 1.
    """
    if len(fractions) != len(schedules) or min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise UsageError(f"fractions {list(fractions)} must be {len(schedules)} positive numbers that sum to 1")
    ends = list(accumulate(fractions))

    def combined(pct: float) -> float:
        which = min(bisect_right(ends, pct), len(ends) - 1)
        begin = ends[which] - fractions[which]
        return schedules[which](min(1.0, (pct - begin) / fractions[which]))

    return combined


def one_cycle(
    pct: float, peak: float, anneal: Anneal = linear, pct_start: float = 0.25, div: float = 10.0, div_final: float = 0.0
) -> float:
    """From peak/div up to `peak` over the first `pct_start`, then down to peak/div_final (0 where that is 0).

    Smith (https://arxiv.org/abs/1708.07120). The defaults are the book chapter's; fastai's own are cosine, 0.25, 25
    and 1e5.
    """
    last = peak / div_final if div_final else 0.0
    pieces = [partial(anneal, peak / div, peak), partial(anneal, peak, last)]
    return combine([pct_start, 1 - pct_start], pieces)(pct)


def one_cycle_momentum(
    pct: float, moms: tuple[float, float, float] = (0.95, 0.85, 0.95), anneal: Anneal = linear, pct_start: float = 0.25
) -> float:
    "The momentum that goes with one_cycle: down to moms[1] as the rate rises, up to moms[2] as it falls."
    pieces = [partial(anneal, moms[0], moms[1]), partial(anneal, moms[1], moms[2])]
    return combine([pct_start, 1 - pct_start], pieces)(pct)


def fine_tuning(step: int, frozen: int, steps: int, lr: float) -> slice:
    """The rates of a step of fastai's fine_tune, from the body's to the head's, for `spread`.

    In the first `frozen` of all `steps`, when the head learns alone, one cycle up to `lr` (the body's BatchNorm has a
    tenth of it); then one up to half of it, of which the first layers have a hundredth.
    """
    pct, pct_start = _stage(step, frozen, steps)
    if step < frozen:
        return slice(None, one_cycle(pct, lr, cosine, pct_start, 25.0, 1e5))
    head = one_cycle(pct, lr / 2, cosine, pct_start, 5.0, 1e5)
    return slice(head / 100, head)


def fine_tuning_momentum(step: int, frozen: int, steps: int, moms: tuple[float, float, float]) -> float:
    "The momentum that goes with the two cycles of fine_tuning."
    pct, pct_start = _stage(step, frozen, steps)
    return one_cycle_momentum(pct, moms, cosine, pct_start)


def _stage(step: int, frozen: int, steps: int) -> tuple[float, float]:
    "Progress within the frozen or the other part, and where in it the peak is."
    return (step / frozen, 0.99) if step < frozen else ((step - frozen) / (steps - frozen), 0.3)


def flat_cosine(pct: float, peak: float, pct_start: float = 0.75) -> float:
    "`peak` for the first `pct_start`, then half a cosine to 0."
    return combine([pct_start, 1 - pct_start], [lambda _: peak, partial(cosine, peak, 0.0)])(pct)


def warm_restarts(pct: float, peak: float, cycles: int = 3, factor: float = 2.0) -> float:
    "Half cosines from `peak` to 0, each `factor` as long as the one before: SGDR (https://arxiv.org/abs/1608.03983)."
    lengths = [factor**n for n in range(cycles)]
    return combine([length / sum(lengths) for length in lengths], [partial(cosine, peak, 0.0)] * cycles)(pct)


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "one_cycle": one_cycle,
    "constant": lambda pct, peak: peak,
    "cosine": lambda pct, peak: cosine(peak, 0.0, pct),
    "flat_cosine": flat_cosine,
    "warm_restarts": warm_restarts,
}
