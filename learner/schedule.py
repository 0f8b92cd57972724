"Schedules: pure functions of progress, the fraction of all steps that are done, in [0, 1)."

from __future__ import annotations

import math
from collections.abc import Callable

Anneal = Callable[[float, float, float], float]


def linear(start: float, end: float, pct: float) -> float:
    "From `start` to `end` in a straight line."
    return (1 - pct) * start + pct * end


def cosine(start: float, end: float, pct: float) -> float:
    "From `start` to `end` along half a cosine: slow, fast, slow (https://arxiv.org/abs/1608.03983)."
    return end + (start - end) * (1 + math.cos(math.pi * pct)) / 2


def one_cycle(pct: float, peak: float, anneal: Anneal = linear, pct_start: float = 0.25, div: float = 10.0) -> float:
    "From peak/div up to `peak` over the first `pct_start`, then down to 0: Smith (https://arxiv.org/abs/1708.07120)."
    if pct < pct_start:
        return anneal(peak / div, peak, pct / pct_start)
    return anneal(peak, 0.0, (pct - pct_start) / (1 - pct_start))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "one_cycle": one_cycle,
    "constant": lambda pct, peak: peak,
    "cosine": lambda pct, peak: cosine(peak, 0.0, pct),
}
