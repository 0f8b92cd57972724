"What a run must not leave behind: processes, named shared memory."

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def living(pids: Iterable[int]) -> dict[int, str]:
    "Those of the processes that are still there, zombies left out, with their names."
    found = {}
    for pid in pids:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            continue
        if rest.split()[0] != "Z":
            found[pid] = name.partition("(")[2]
    return found


def shared_memory(pid: int) -> set[str]:
    "The segments that a process has mapped and that have a name."
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}


def wait_until_gone(look: Callable[[], Any], seconds: float) -> Any:
    "What `look` still finds after at most so many seconds."
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
