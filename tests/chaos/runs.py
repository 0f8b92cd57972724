"A run on Ray workers, driven by hand as the driver does it, and all that it leaves."

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.messages import Chunk, Job, Report
from cluster.ray_gang import RayGang
from tests.chaos.injector import HANGS, KINDS, PHASES, Fault, Plan

STEPS = 7  # in an epoch: 53 pictures in batches of 8
EPOCHS = 2


@dataclass(frozen=True)
class Run:
    "All that a run leaves: the sums of each batch, of training and of validation, and each rank's state."

    trained: list[tuple[float, ...]]
    valid: list[tuple[float, ...]]
    prints: list[str]
    places: list[int]


def fault_of(phase: str, kind: str) -> Fault:
    "One of that kind in that phase, at a rank and a step that vary from pair to pair."
    i, j = PHASES.index(phase), KINDS.index(kind)
    rank = 0 if phase == "checkpoint" else (i + j) % 3
    later = 6 * (kind in HANGS)  # most of them: before steps are known to be short, a hang is waited for longer
    step = STEPS if phase in ("validate", "checkpoint") else (2 * i + 3 * j + later) % (STEPS * EPOCHS)
    if (phase, kind) == ("data", "unreadable"):
        step = 4  # in the first epoch, in which the file is read by whichever rank has it then
    return Fault(rank, step, phase, kind)


def chunks(train: bool, epoch: int, length: int) -> Iterator[Chunk]:
    "An epoch in chunks of that length."
    n = STEPS if train else 4
    for first in range(0, n, length):
        size = min(length, n - first)
        hypers = tuple({"lr": 0.1 / (1 + first + i)} if train else {} for i in range(size))
        yield Chunk(train, epoch, first, epoch * STEPS + first * train + STEPS * (not train), hypers)


def columns(reports: list[Report]) -> list[tuple[float, ...]]:
    "What each batch of a chunk came to."
    return list(zip(*reports[0].batches.values()))


def drive(gang: RayGang, epochs: int = EPOCHS, length: int = 3) -> Run:
    "Train, take a checkpoint, and validate; as the driver does."
    found: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
    places = []
    for epoch in range(epochs):
        for train in (True, False):
            for reports in gang.stream(chunks(train, epoch, length)):
                found[train] += columns(reports)
                places += [reports[0].chunk.first + i for i in range(len(reports[0].chunk.hypers))]
            gang.call_first("snapshot")
    return Run(found[True], found[False], gang.call("fingerprint"), places)


def threaten(gang: RayGang, plan: Plan, faults: list[Fault]) -> None:
    """Plan these faults. Where some are hangs, the gang is quick to call a worker hung.

    Only there: on a busy machine, a healthy one may be held up for so long.
    """
    if any(fault.kind in HANGS for fault in faults):
        gang.tolerance = replace(gang.tolerance, hang_after=1.5)
    plan.write(faults)


def is_told(fault: Fault, notice: str) -> bool:
    "Whether a notice says who failed, and what was seen of it; on a busy machine a pulse may be late too."
    hangs = {"SIGSTOP": ["no sign of life"], "sleep": ["stands still", "no sign of life"]}
    raised = {"raise": ["RuntimeError: injected"], "memory": ["OutOfMemoryError: injected"]}
    seen = {**hangs, **raised}.get(fault.kind, ["died"])
    return f"rank {fault.rank} " in notice and any(what in notice for what in seen)


def go_on(gang: RayGang, job: Job, plan: Plan, step: int, healthy: Run) -> None:
    "What can be saved of a run that ended is all up to `step`: once the cause is mended, it goes on from there."
    salvaged = gang.salvage()
    assert salvaged is not None
    plan.write([])
    gang.start(job, 3)
    gang.call("load", salvaged)
    epoch, first = divmod(step, STEPS)
    rest = [chunk for chunk in chunks(True, epoch, 1) if chunk.first >= first]
    assert [row for reports in gang.stream(rest) for row in columns(reports)] == healthy.trained[
        step : STEPS * (epoch + 1)
    ]
