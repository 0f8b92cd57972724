"A WorkerProcess in which faults can be planned: at a rank, a step and a phase of it, of some kind, once."

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.worker_process import WorkerProcess
from learner.learner import Callback

PHASES = ("data", "forward", "backward", "reduce", "update", "validate", "checkpoint")
KINDS = ("raise", "exit", "SIGKILL", "SIGSTOP", "sleep")


@dataclass(frozen=True)
class Fault:
    "`kind` befalls `rank` at `step`, in `phase`; `times` over, in whichever process has that rank then."

    rank: int
    step: int
    phase: str
    kind: str
    times: int = 1


class Plan:
    "The faults to come, in a folder that all processes see, which also has a file for each that came."

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, faults: list[Fault]) -> None:
        "Forget what was, and plan these."
        for file in self.folder.glob("*"):
            file.unlink()
        (self.folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))

    def read(self) -> list[Fault]:
        "The faults that are planned."
        file = self.folder / "plan.json"
        return [Fault(**fault) for fault in json.loads(file.read_text())] if file.exists() else []

    def take(self, number: int, times: int) -> bool:
        "Whether that fault is still to come, which it then has."
        for time_ in range(times):
            try:
                os.close(os.open(self.folder / f"fired_{number}_{time_}", os.O_CREAT | os.O_EXCL))
                return True
            except FileExistsError:
                continue
        return False

    def fired(self) -> int:
        "How many faults came."
        return len(list(self.folder.glob("fired_*")))


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

    def _start(self, *args: Any) -> None:
        super()._start(*args)
        worker = self.worker
        assert worker is not None
        worker.learner.add_cb(Phases(self.reach))
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

    def reach(self, phase: str) -> None:
        "If a fault is planned for here and now, let it come."
        plan = Plan(self.folder)
        assert self.worker is not None
        for number, fault in enumerate(plan.read()):
            here = (fault.rank, fault.step, fault.phase) == (self.rank, self.worker.step, phase)
            if here and plan.take(number, fault.times):
                print(f"injected: {fault}", flush=True)
                befall(fault.kind)


def befall(kind: str) -> None:
    "Let a fault come over this process."
    if kind == "raise":
        raise RuntimeError("injected")
    if kind == "exit":
        os._exit(1)
    if kind == "sleep":
        time.sleep(300)
    os.kill(os.getpid(), getattr(signal, kind))
    time.sleep(300)  # until the signal is here
