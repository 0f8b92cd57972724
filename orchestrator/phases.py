"Phases: where the time between the command and the first step goes."

from __future__ import annotations

import os
import time
from pathlib import Path


class Phases:
    "Seconds of each phase, from the start of this process on: `done(name)` ends one and begins the next."

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = process_start()

    def done(self, name: str) -> None:
        "Note how long the phase that ends here took."
        now = time.clock_gettime(CLOCK)
        self.seconds[name], self._last = round(now - self._last, 3), now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"


CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # Linux counts the starts of processes by the former


def process_start() -> float:
    "When this process began, by `CLOCK`; where the system does not say, now."
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.clock_gettime(CLOCK)
    ticks = stat.read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")
