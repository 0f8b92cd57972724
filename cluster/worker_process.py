"WorkerProcess: a Worker in a process of its own, whose errors become Failures. What Ray makes an actor of."

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.comms import GROUPS, Group
from cluster.faults import Failure
from cluster.gang import Seat
from cluster.meeting import KeyStoreClient, Meeting
from cluster.messages import Job
from cluster.pulse import Sign, start_pulse
from cluster.ray_cluster import node_address
from cluster.worker import Worker
from learner.memory import keep_memory


@dataclass(frozen=True)
class Location:
    "Where a process runs: host name, process number, and the address that tells its node from the others."

    host: str
    pid: int
    node: str


class WorkerProcess:
    "Has one Worker, of which it says over and over whether it lives."

    def __init__(self, name: str, meeting: Meeting, backend: str, gpu: bool, log_folder: str) -> None:
        self.backend, self.log_folder = backend, log_folder
        self.rank, self.busy = -1, "starting"
        self.worker: Worker | None = None
        self.group: Group | None = None
        self.out_of_group = True
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")  # Ray shows each worker its own GPU alone
        if gpu:  # here, where a broken one is passed over, and nobody watches: no pulse beats for the seconds it takes
            torch.cuda.set_device(self.device)
        keep_memory()
        start_pulse(meeting, name, self.sign, self.listen)

    def where(self) -> Location:
        "Where this process is."
        return Location(socket.gethostname(), os.getpid(), node_address())

    def sign(self) -> Sign:
        "What this process is doing: called by the thread of its pulse."
        worker = self.worker
        if self.busy or worker is None:
            return Sign(0, -1, self.busy)
        return Sign(worker.moves, worker.step, "communication" if worker.comm.waiting else worker.doing)

    def listen(self, store: KeyStoreClient) -> None:
        "Wait no more for a group that the driver has called off: called by the thread of its pulse."
        group = self.group
        if group is not None and store.is_off(group.name):
            group.let_go()

    def start(self, seat: Seat, job: Job, meeting: Meeting, joining: bool) -> Failure | None:
        "Take the seat and begin the job; `joining` ranks that are at it already, whose state is still to come."
        return self._attempt(lambda: self._start(seat, job, meeting, joining))

    def _start(self, seat: Seat, job: Job, meeting: Meeting, joining: bool) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        comm = self._sit(seat, meeting)
        self.worker = Worker(job, comm, self.device, seat.threads, joining)
        note(f"{seat} on {self.device}")

    def rejoin(self, seat: Seat, meeting: Meeting) -> Failure | None:
        "Go on with the same Worker in another group, maybe at another rank."
        return self._attempt(lambda: self._rejoin(seat, meeting))

    def _rejoin(self, seat: Seat, meeting: Meeting) -> None:
        assert self.worker is not None
        self.worker.comm.close()
        self.worker.join(self._sit(seat, meeting))
        note(f"{seat} goes on after step {self.worker.step}")

    def _sit(self, seat: Seat, meeting: Meeting) -> Group:
        "Log file, environment as torchrun sets it, threads, process group."
        self.rank = seat.rank
        redirect_output(seat.log_file(Path(self.log_folder)))
        os.environ |= {**seat.environment(), "MASTER_ADDR": meeting.host, "MASTER_PORT": f"{meeting.port}"}
        torch.set_num_threads(seat.threads)
        self.group = GROUPS[self.backend](seat.rank, seat.world_size, meeting)
        return self.group

    def _attempt(self, start: Any) -> Failure | None:
        self.busy, self.out_of_group = "starting", False
        try:
            start()
            return None
        except Exception as error:
            return self._failure(error)
        finally:
            self.busy = ""

    def call(self, method: str, *args: Any) -> Any:
        "Call the Worker; on an error leave the group at once, so that no other rank waits for this one."
        worker = self.worker
        assert worker is not None
        if self.out_of_group and method == "run":
            return Failure(self.rank, socket.gethostname(), os.getpid(), "peer", "its group has ended")
        worker.moves += 1
        try:
            return getattr(worker, method)(*args)
        except Exception as error:
            return self._failure(error, method == "run")

    def _failure(self, error: Exception, running: bool = False) -> Failure:
        self.out_of_group = True
        step, report, whole = -1, None, False
        if self.group is not None:
            self.group.close()
        if self.worker is not None:
            step = self.worker.step
            with suppress(RuntimeError, MemoryError):  # a GPU that is out of order gives nothing back
                report = self.worker.report() if running else None
                whole = self.worker.whole
        failure = Failure.of(self.rank, error, step, report, whole)
        note(failure.trace)
        return failure


def note(text: str) -> None:
    "Write into the log, where the disk has room: a worker is worth more than its log."
    with suppress(OSError):
        print(text, flush=True)


def redirect_output(log: Path) -> None:
    "Send all that this process prints, C++ libraries included, to a file, if the disk has room for it."
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(target, stream)
        os.close(target)
