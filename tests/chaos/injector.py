"A WorkerProcess in which faults can be planned: at a rank, a step and a phase of it, of some kind, once."

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cluster.comms import Group
from cluster.gang import Seat
from cluster.meeting import Meeting
from cluster.messages import Job
from cluster.shards import local_batch, n_batches
from cluster.worker import Worker
from cluster.worker_process import WorkerProcess, note
from learner.data.images import BadImage
from learner.data.loader import epoch_order
from learner.learner import Callback

PHASES = ("data", "forward", "backward", "reduce", "update", "validate", "checkpoint")
DEADLY = ("raise", "exit", "SIGKILL", "SIGSTOP", "sleep", "memory")  # after which another process has to take over
HANGS = ("SIGSTOP", "sleep")
NAP = 0.3  # seconds that a crawling worker needs more for a step; it is no fault to be made up for
KINDS = (*DEADLY, "NaN", "unreadable", "full disk")
BEGIN = -1  # the step of who only begins a job, in the phases meet (the others), connect (to them) and start


@dataclass(frozen=True)
class Fault:
    "`kind` befalls `rank` at `step`, in `phase`; `times` over, in whichever process has that rank then."

    rank: int
    step: int
    phase: str
    kind: str
    times: int = 1


class Plan:
    """The faults to come, in a folder that all processes see, which also has a file for each that came.

    And the backend over which the ranks talk from the next start on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.backend = folder, "gloo"

    def write(self, faults: list[Fault]) -> None:
        "Forget what was, and plan these."
        for file in self.folder.glob("*"):
            file.unlink()
        (self.folder / "plan.json").write_text(json.dumps([self.backend, *map(asdict, faults)]))

    def read(self) -> list[Fault]:
        "The faults that are planned."
        self.backend, *faults = self._written()
        return [Fault(**fault) for fault in faults]

    def _written(self) -> list[Any]:
        file = self.folder / "plan.json"
        return json.loads(file.read_text()) if file.exists() else [self.backend]

    def take(self, number: int, times: int) -> bool:
        "Whether that fault is still to come, which it then has."
        for time_ in range(times):
            try:
                os.close(os.open(self.folder / f"fired_{number}_{time_}", os.O_CREAT | os.O_EXCL))
                return True
            except FileExistsError:
                continue
        return False

    def unreadable(self, job: Job) -> dict[str, int]:
        "The files that a disk error has made unreadable for all, each with the number of its fault."
        faults = [(number, fault) for number, fault in enumerate(self.read()) if fault.kind == "unreadable"]
        return {file_of(job, fault): number for number, fault in faults}

    def fired(self) -> int:
        "How many faults came."
        return len(list(self.folder.glob("fired_*")))


def file_of(job: Job, fault: Fault, world_size: int = 3) -> str:
    "The first file that the rank of a fault reads for its step, or for the first batch of a validation."
    data, step = (job.valid, 0) if fault.phase == "validate" else (job.train, fault.step)
    epoch, batch = divmod(step, n_batches(len(data), job.batch_size))
    order = epoch_order(len(data), job.seed, epoch) if data is job.train else range(len(data))
    place = local_batch(len(data), job.batch_size, batch, fault.rank, world_size).places[0]
    return data.files[order[place]]


class Phases(Callback):
    "Tells an Injector where in a step the Learner is."

    order = 1000

    def __init__(self, reach: Any) -> None:
        self.reach = reach

    def before_batch(self) -> None:
        self.reach("forward" if self.model.training else "validate")

    def after_loss(self) -> None:
        if self.model.training:
            self.reach("backward")

    def after_backward(self) -> None:
        self.reach("reduce")


class FaultyProcess(WorkerProcess):
    "Has the faults of the plan in `folder` happen to it."

    folder = Path("/nowhere")
    root = Path("/nowhere")  # of the project

    def _sit(self, seat: Seat, meeting: Meeting) -> Group:
        plan, self.rank = Plan(self.folder), seat.rank
        plan.read()
        self.backend = plan.backend
        if self.backend == "silent":
            sys.path.append(str(self.root))
            import_module("tests.chaos.silent").install()
        self.reach("meet")
        connect = Group._connect

        def fail_and_connect(group: Group, *args: Any) -> None:
            self.reach("connect")
            connect(group, *args)

        with patch.object(Group, "_connect", fail_and_connect):
            group = super()._sit(seat, meeting)
        self.reach("start")
        return group

    def _start(self, *args: Any) -> None:
        super()._start(*args)
        worker = self.worker
        assert worker is not None
        worker.learner.add_cb(Phases(self.reach))
        for loader in worker.data.loaders.values():
            loader.dataset.read = self.failing(loader.dataset.read, worker.job)  # type: ignore[method-assign]
        worker.learner.opt.then(lambda params: self.reach("update"))
        say, snapshot = worker._say, worker.snapshot

        def say_and_fail(doing: str) -> None:
            say(doing)
            if doing == "data" and worker.chunk.train:
                self.reach("data")

        def fail_and_copy() -> Any:
            self.reach("checkpoint")
            return snapshot()

        worker._say, worker.snapshot = say_and_fail, fail_and_copy  # type: ignore[method-assign]

    def failing(self, read: Any, job: Job) -> Any:
        "Reading files as `read` does, but for those that the plan has made unreadable."
        plan = Plan(self.folder)

        def read_or_fail(indices: Any, out: Any) -> dict[int, BadImage]:
            bad = read(indices, out)
            if unreadable := plan.unreadable(job):
                files = read.__self__.labelled.files
                for row, file in enumerate(files[i] for i in indices):
                    if file in unreadable:
                        plan.take(unreadable[file], 1)
                        bad[row] = BadImage(file, "Input/output error (injected)")
            return bad

        return read_or_fail

    def reach(self, phase: str) -> None:
        "If a fault is planned for here and now, let it come."
        plan, step = Plan(self.folder), self.worker.step if self.worker else BEGIN
        for number, fault in enumerate(plan.read()):
            here = (fault.rank, fault.step, fault.phase) == (self.rank, step, phase)
            if here and fault.kind != "unreadable" and plan.take(number, fault.times):
                note(f"injected: {fault}")
                if fault.kind == "NaN" and self.worker:
                    spoil(self.worker, phase)
                elif fault.kind == "full disk":
                    self.fill_disk()
                elif fault.kind == "nap":
                    time.sleep(NAP)
                else:
                    befall(fault.kind)

    def fill_disk(self) -> None:
        "From now on, there is no room for what this process writes."
        full, self.log_folder = os.open("/dev/full", os.O_WRONLY), "/dev/full/logs"
        for stream in (1, 2):
            os.dup2(full, stream)


def spoil(worker: Worker, phase: str) -> None:
    "Put a NaN where that phase computes."
    learner = worker.learner
    if phase in ("forward", "validate"):
        learner.batch = learner.batch[0] * float("nan"), learner.batch[1]
    elif phase == "backward":
        learner.loss = learner.loss * float("nan")
    else:
        worker.reducer.gradients[0] = float("nan")


def befall(kind: str) -> None:
    "Let a fault come over this process."
    if kind == "raise":
        raise RuntimeError("injected")
    if kind == "memory":
        raise torch.OutOfMemoryError("injected")
    if kind == "exit":
        os._exit(1)
    if kind == "sleep":
        time.sleep(300)
    os.kill(os.getpid(), getattr(signal, kind))
    time.sleep(300)  # until the signal is here
