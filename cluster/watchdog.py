"""The watchdog: once the driver is gone, however that went, it ends what is left of a Ray cluster of the driver's own.

A program of its own, with nothing but Python's standard library: `python watchdog.py [FOLDER]`. Its standard input is a
pipe that the driver alone holds open, so the pipe's end is the driver's end, a SIGKILL included. Ray's own agents
would go on for a minute then, since they try that long to report to a server which is dead too.

A driver that leaves in peace writes `PEACE` before. Of any other's end the watchdog tells the user: nobody else can,
since a driver that loses the Ray of its machine is ended by Ray at once, without a word. So is one in which Ray can't
begin a thread, or it waits for ever: a driver writes `UP` once Ray is there, and is ended where it never does.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

MARK = "ORCHESTRATOR_CLUSTER"  # in the environment of every process of the cluster: its folder
SECONDS = 5.0  # in which processes that were just being started may still turn up
UP, PEACE = b"+", b"."  # what the driver has to say
STARTING = 180.0  # seconds for Ray to be up; its own waits end after one or two minutes, but for those in its C++
NEEDS = (
    "it needs a few hundred open files (ulimit -n), processes (ulimit -u), files of 256 MiB (ulimit -f), and room in "
    "memory and on the disk of TMPDIR; --local does without Ray"
)
NOT_UP = (
    "\nerror: Ray could not be started: meanwhile the run's own process was ended, or waited in vain for 3 minutes; "
    f"{NEEDS}"
)
LAST_WORDS = (
    "\nerror: the run's own process was ended from outside: killed, out of memory, or by Ray, of whose processes on "
    "this machine one is gone; the same command with --resume last goes on from the newest checkpoint"
)


def members(folder: str) -> Iterator[int]:
    "The processes of the cluster in this folder; other users' can't be seen, and are none of it."
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if _is_marked(name, folder) or _is_agent(name, folder):
                yield int(name)
        except OSError:
            continue  # it ended while we looked, or it is not ours


def _is_marked(pid: str, folder: str) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{MARK}={folder}".encode() in file.read().split(b"\0")


def _is_agent(pid: str, folder: str) -> bool:
    "Ray's agents write their title over their environment: one with such a title and a log in the folder."
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        if file.read(5) != b"ray::":
            return False
    files = f"/proc/{pid}/fd"
    return any(os.readlink(f"{files}/{number}").startswith(f"{folder}/") for number in os.listdir(files))


def end(folder: str) -> None:
    "Kill the members until none is left, and remove the folder."
    deadline = time.monotonic() + SECONDS
    while (there := list(members(folder))) and time.monotonic() < deadline:
        for pid in there:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def watch(driver: int, heard: int) -> str:
    "Until the driver is gone: what there is to tell of that. One whose Ray does not come up is ended."
    if not select.select([heard], [], [], STARTING)[0]:
        os.kill(driver, signal.SIGKILL)
    said = os.read(heard, 1)
    while more := os.read(heard, 1):
        said += more
    return "" if PEACE in said else LAST_WORDS if UP in said else NOT_UP


if __name__ == "__main__":
    if last := watch(os.getppid(), 0):
        with suppress(OSError):
            print(last, file=sys.stderr, flush=True)
    for its_own in sys.argv[1:]:
        end(its_own)
