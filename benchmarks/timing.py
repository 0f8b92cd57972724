"Timing of alternatives in turn, so that a machine that slows down slows all of them."

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import comb


def interleaved(
    alternatives: Mapping[str, Callable[[], object]], rounds: int, ready: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each alternative in each round, after one round that is not counted.

    A B C, B C A, C A B, then the same backwards, and so on, so that none always comes after the same other; `ready()`
    is called before each. An alternative that gives a number has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for number in range(rounds + 1):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order[:: -1 if number // len(names) % 2 else 1]:
            ready()
            started = time.perf_counter()
            told = alternatives[name]()
            passed = time.perf_counter() - started
            if number:
                seconds[name].append(told if isinstance(told, float) else passed)
    return seconds


def quotients(seconds: Mapping[str, list[float]], name: str, baseline: str) -> list[float]:
    "An alternative's time over the baseline's, round by round."
    return [a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)]


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, tuple[float, float, float]]:
    "Median, lower and upper quartile of each alternative's time over the baseline's in the same round."
    return {name: quartiles(quotients(seconds, name, baseline)) for name in seconds}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    "Median, lower and upper quartile."
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Between which two of the values the true median lies, and with what probability, whatever the distribution.

    The closest two with 95%, as far as there are such: of fewer than 6 values, the least and the largest are less sure.
    """
    ordered, n = sorted(values), len(values)

    def surely(left_out: int) -> float:
        return 1 - 2 * sum(comb(n, k) for k in range(left_out + 1)) / 2**n

    left_out = max((k for k in range(n // 2) if surely(k) >= 0.95), default=0)
    return ordered[left_out], ordered[n - 1 - left_out], surely(left_out)


def aim(limit: float, *measured: Sequence[float], least: bool = False) -> str:
    "What was asked for, at most or at `least`, and which of the medians beside it miss it: nothing hides in a table."
    missed = [f"{m:.4g}" for m in map(statistics.median, measured) if (m < limit if least else m > limit)]
    return f"{limit:g}" + (f" MISSED: {', '.join(missed)}" if missed else "")


def shown(values: Sequence[float], digits: int = 2) -> str:
    "Median (quartiles), by how much of it the median is uncertain, and how sure that is."
    middle, low, high = quartiles(values)
    below, above, sure = median_interval(values)
    uncertain = max(middle - below, above - middle) / middle
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}; median ±{100 * uncertain:.1f}% at {sure:.0%})"
