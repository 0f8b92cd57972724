"The crew: the processes of a run as Ray actors: placed, waited for, seated, ended, and replaced."

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.meeting import Meeting
from cluster.ray_cluster import first_line, in_bundle, require
from cluster.worker_process import Location, WorkerProcess
from learner.errors import UsageError, UserError

PLACEMENT_TIMEOUT = 60.0
ANSWER = 10.0  # seconds for a process that is up to say so again
GLANCE = 0.5  # seconds between two looks at whether the run is to stop
MAX_LOST = 5  # processes in a row that ended in one place, on the bench: one that can never start would go on for ever


@dataclass(frozen=True)
class Workers:
    """How many workers to start and on what: `gpus_each` is below 1 where they share cards, 0 for CPU workers.

    Where `at_least` so many will do, the others may come when there is room for them. For that of those that are needed
    `patience` seconds are waited in a cluster that is too small: machines that are gone may come back.
    """

    count: int
    gpus_each: float
    backend: str
    address: str | None = None
    at_least: int | None = None
    patience: float = 0.0


NOWHERE = Location("unknown", 0, "")


@dataclass(eq=False)
class Member:
    "One process: its name, the bundle of resources it has, its actor, and the answer to where it is, once it is up."

    name: str
    bundle: int
    actor: Any
    answer: Any
    location: Location = NOWHERE
    at_work: bool = False  # it has a Worker for the job of now
    unfit: bool = False  # it could not begin, nor is another one to try
    ended: str = ""  # why it had to be ended


class Crew:
    """Starts and ends processes, each in a bundle of a placement group of Ray's.

    Those that are needed share one, so that all of them begin or none; where fewer will do, each of the others has its
    own, which is placed once there is room. `seated` are those that work, by rank. `bench` has those that are up, or on
    their way, and have no seat: spares, and replacements of those that are gone.
    """

    def __init__(self, ray: Any, workers: Workers, spares: int, meeting: Meeting, log_folder: str) -> None:
        self.ray, self.workers, self.meeting, self.log_folder = ray, workers, meeting, log_folder
        self.hired = 0
        self.lost, self.why = Counter[int](), ""  # processes in a row that ended so, by bundle, and why the last did
        self.members: list[Member] = []
        self.seated: list[Member] = []
        self.bench: list[Member] = []
        self.stop: Callable[[], bool] = lambda: False  # whether nobody is to be waited for any more
        needed = workers.count + spares if workers.at_least is None else workers.at_least
        self._place(needed, workers.count + spares)

    def _place(self, count: int, wanted: int) -> None:
        workers = self.workers
        bundle = {"CPU": 1.0} | ({"GPU": workers.gpus_each} if workers.gpus_each else {})
        self._await_room({name: amount * count for name, amount in bundle.items()})
        group, longest = self.ray.util.placement_group([bundle] * count), workers.patience or PLACEMENT_TIMEOUT
        deadline = time.monotonic() + longest
        while not group.wait(1):  # in which no signal is heard
            if time.monotonic() > deadline:
                raise UserError(
                    f"{count} workers with {bundle} each found no place within {longest:g} s; "
                    "is the cluster busy? Ask for fewer, or wait"
                )
        alone = [self.ray.util.placement_group([bundle]) for _ in range(wanted - count)]
        self.bundles = [*((group, number) for number in range(count)), *((one, 0) for one in alone)]
        for number in range(wanted):
            self.hire(number)

    def _await_room(self, need: dict[str, float]) -> None:
        deadline = time.monotonic() + self.workers.patience
        while True:
            try:
                return require(self.ray, need, self.workers.address)
            except UsageError as error:
                if not self.workers.patience:
                    raise
                if time.monotonic() > deadline:
                    raise UserError(f"{error}, or wait longer with --wait-for-workers SECONDS") from error
            time.sleep(GLANCE)

    def hire(self, bundle: int) -> None:
        "Begin to start a process in that bundle; it is on the bench from now on."
        name, workers = f"{self.hired}", self.workers
        self.hired += 1
        actor = self.ray.remote(max_restarts=0, max_task_retries=0)(WorkerProcess)
        placed = actor.options(
            num_cpus=1, num_gpus=workers.gpus_each, scheduling_strategy=in_bundle(*self.bundles[bundle])
        ).remote(name, self.meeting, workers.backend, bool(workers.gpus_each), self.log_folder)
        member = Member(name, bundle, placed, placed.where.remote())
        self.members.append(member)
        self.bench.append(member)

    def take(self, wait: float) -> Member | None:
        "The first of the bench that is up, which leaves it; None if none is within `wait` seconds, or before a stop."
        deadline = time.monotonic() + wait
        while self.bench:
            answers = {member.answer: member for member in self.bench}
            left = 0.0 if self.stop() else max(0.0, deadline - time.monotonic())
            up, _ = self.ray.wait(list(answers), num_returns=1, timeout=min(left, GLANCE))
            if not up:
                if left <= GLANCE:
                    return None
                continue
            member = answers[up[0]]
            self.bench.remove(member)
            try:
                self.ray.get(member.answer)
                member.location = self.ray.get(member.actor.where.remote(), timeout=ANSWER)  # it may have ended since
                self.lost[member.bundle] = 0
                return member
            except self.ray.exceptions.RayError as error:
                advised = isinstance(error, self.ray.exceptions.OutOfMemoryError)  # ends in Ray's advice on its tasks
                why = first_line(error) if advised else str(error).strip().splitlines()[-1]
                self.why = f": {why}"
                self.lost[member.bundle] += 1  # also where Ray did not know yet that the machine is gone
                self.dismiss(member, replace=self.lost[member.bundle] <= MAX_LOST)
        return None

    def seat(self, count: int, wait: float) -> None:
        """Seat that many for a new job, those of a node side by side; or after `wait` seconds, as many as will do.

        Who had a seat has it again, once it says that it is still there. UserError where fewer come up.
        """
        for member in self.seated:
            member.at_work, member.answer = False, member.actor.where.remote()
        self.seated, self.bench = [], [*self.seated, *self.bench]
        enough, longest = min(count, self.workers.at_least or count), max(wait, PLACEMENT_TIMEOUT)
        if enough < count:
            self._fill(count, max(wait, self.workers.patience))
        self._fill(enough, longest)
        if len(self.seated) < enough:
            why = self.why or "; where all is slow, --wait-for-workers SECONDS gives them longer"
            raise UserError(f"only {len(self.seated)} of {enough} workers started in {longest:g} s{why}")
        self.seated.sort(key=lambda member: (member.location.node, member.bundle))

    def _fill(self, count: int, wait: float) -> None:
        "Fill so many seats from the bench, as far as processes come up in `wait` seconds."
        deadline = time.monotonic() + wait
        while len(self.seated) < count and (member := self.take(max(0.0, deadline - time.monotonic()))):
            self.seated.append(member)

    def replace(self, gone: set[Member], wait: float) -> None:
        "Put others, of those that are up within `wait` seconds, into the seats of those that are gone."
        for member in gone:
            self.dismiss(member, replace=not member.unfit)
        deadline = time.monotonic() + wait
        seats = [
            self.take(max(0.0, deadline - time.monotonic())) if member in gone else member for member in self.seated
        ]
        self.seated = [member for member in seats if member is not None]

    def end(self, member: Member, why: str) -> None:
        "End a process, however stuck it is."
        location = member.location
        member.ended = why + (" (its process is stopped)" if stopped(location) else "")
        if location.host == socket.gethostname() and _is_ours(location.pid):
            with suppress(OSError):
                os.kill(location.pid, signal.SIGKILL)  # Ray takes seconds to end a stopped process
        self.ray.kill(member.actor)

    def dismiss(self, member: Member, replace: bool) -> None:
        "Do without a process, which ends; another one begins to start in its place if it is to be replaced."
        self.end(member, member.ended)
        self.members.remove(member)
        if member in self.bench:
            self.bench.remove(member)
        if replace:
            self.hire(member.bundle)

    def close(self) -> None:
        "End all."
        for member in list(self.members):
            self.ray.kill(member.actor)


def _is_ours(pid: int) -> bool:
    "Whether that process number is still one of Ray's workers, and not by now somebody else's."
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def stopped(location: Location) -> bool:
    "Whether a process of this machine is stopped by a signal."
    try:
        stat = Path(f"/proc/{location.pid}/stat").read_text()
    except OSError:
        return False
    return location.host == socket.gethostname() and stat.rpartition(")")[2].split()[0] == "T"
