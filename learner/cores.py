"Processors: how many of them this process may use."

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """How many processors this process may run on; fewer where its container has the time of fewer.

    A container that may use 2 of 64 (`docker run --cpus 2`, a pod's limit) sees all 64. 64 threads there would spend
    the time of each tenth of a second in its first 3 ms, and wait for the next, in the midst of a sum.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    "The processors' time per time that Linux's control groups (version 2) leave to this process; infinite: no limit."
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    folder = CGROUPS / own.lstrip("/")
    return min(_share(group / "cpu.max") for group in (folder, *folder.parents))


def _share(file: Path) -> float:
    "What a file such as `200000 100000` (microseconds in each so many) grants: 2; `max`, or no file: no limit."
    try:
        granted, period = file.read_text().split()
        return int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
