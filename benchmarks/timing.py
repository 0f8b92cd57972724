"Timing of alternatives in turn, so that a machine that slows down slows all of them."

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(alternatives: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    "Seconds of each alternative in each round, A B C, A B C ..., after one round that is not counted."
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, action in alternatives.items():
            started = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, tuple[float, float, float]]:
    "Median, lower and upper quartile of each alternative's time over the baseline's in the same round."
    table = {}
    for name, mine in seconds.items():
        quotients = [a / b for a, b in zip(mine, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        table[name] = (middle, low, high)
    return table
