"From a worker's death to the first new step, by phase; and what the same fault costs torchrun and Ray Train."

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers.faulty import BATCH, EPOCHS, LR, RANKS, SIZE, STEPS
from cluster.crew import Workers
from cluster.faults import Failure, Tolerance
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from learner.data.files import Labelled
from learner.data.normalize import Normalize

FAULTS = 6  # of each kind
PEER_FAULTS = 3  # in one run, as many as it is allowed
PEER_RUNS = 1
UP = 60.0  # seconds within which a process is up
SEEN = 0.2  # seconds within which a death is to be noticed
PHASES = ("noticed", "agreed", "replaced", "regrouped", "first new step")
PEERS = {  # name: module, what must be installed, how it is launched
    "torchrun, DistributedDataParallel": (
        "chaos_torchrun", "torch",
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=3", "-m"],
    ),
    "Ray Train's TorchTrainer": ("chaos_ray_train", "pyarrow", []),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    "A fault and what there is to make up for it; `target` is in seconds, from the kill or from when it is noticed."

    name: str
    signal: int
    spare: bool
    wait: float
    target: float


CASES = (
    Case("killed, the others go on alone", signal.SIGKILL, False, 0.0, 1.0),
    Case("killed, a warm spare steps in", signal.SIGKILL, True, UP, 1.0),
    Case("killed, a fresh worker", signal.SIGKILL, False, UP, 5.0),
    Case("stopped (SIGSTOP), a fresh worker", signal.SIGSTOP, False, UP, 4.0),
)


class WatchedGang(RayGang):
    "A RayGang that notes when each phase of a recovery ends."

    def __init__(self, *args: Any) -> None:
        self.marks: dict[str, float] = {}
        super().__init__(*args)
        ask, result = self.calls.watch.ask_for_stacks, self.calls.result

        def hangs(name: str) -> None:
            self.mark("noticed")
            ask(name)

        def answered(rank: int, ref: Any) -> Any:
            answer = result(rank, ref)
            if isinstance(answer, Failure):
                self.mark("noticed")
            return answer

        self.calls.watch.ask_for_stacks = hangs  # type: ignore[method-assign]
        self.calls.result = answered  # type: ignore[method-assign]

    def mark(self, name: str) -> None:
        "This is when it was, if it was not before."
        self.marks.setdefault(name, time.monotonic())

    def _repair(self, failures: Sequence[Failure], lead: Sequence[int]) -> None:
        self.mark("agreed")
        super()._repair(failures, lead)

    def _replace(self, gone: Any, failures: Sequence[Failure]) -> None:
        super()._replace(gone, failures)
        self.mark("replaced")

    def _regroup(self) -> list[Failure]:
        failures = super()._regroup()
        self.mark("regrouped")
        return failures


def make_job(folder: Path) -> Job:
    "An epoch of STEPS batches, all of the same few pictures."
    rng = np.random.default_rng(0)
    files = [str(folder / f"{number}.jpg") for number in range(BATCH)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
    train = Labelled(tuple(files * STEPS), tuple(i % 10 for i in range(BATCH * STEPS)))
    return Job(train=train, valid=Labelled((), ()), n_classes=10, arch="simple_cnn", size=SIZE, presize=SIZE,
               batch_size=BATCH, seed=0, normalize=Normalize((0.5,) * 3, (0.25,) * 3), augment="none",
               sync_batchnorm=True, skip_bad_images=False, momentum=0.9)  # fmt: skip


def chunks(epoch: int) -> Iterator[Chunk]:
    "An epoch, step by step."
    return (Chunk(True, epoch, number, epoch * STEPS + number, ({"lr": LR},)) for number in range(STEPS))


def healthy(gang: RayGang) -> tuple[list[str], float]:
    "What a run without a fault ends with, and the median seconds of its steps."
    seconds = [reports[0].seconds["total"] for e in range(FAULTS) for reports in gang.stream(chunks(e))]
    return gang.call("fingerprint"), median(seconds)


@dataclass(frozen=True)
class Outcome:
    "Of each fault the seconds of each phase; how many steps were done twice; what the workers hold in the end."

    phases: list[dict[str, float]]
    repeated: int
    prints: list[str]


def suffer(gang: WatchedGang, case: Case) -> Outcome:
    "A run with a fault in each epoch, to rank 1 in the midst of a step."
    gang.tolerance = replace(gang.tolerance, wait=case.wait)
    phases, steps = [], []
    for epoch in range(FAULTS):
        if case.spare:  # which must be up
            spare = gang.crew.take(UP)
            assert spare is not None
            gang.crew.bench.append(spare)
        gang.marks = {}
        for reports in gang.stream(chunks(epoch)):
            steps.append(reports[0].chunk.step)
            if "regrouped" in gang.marks:
                gang.mark("first new step")
            elif reports[0].chunk.first == STEPS // 2:
                gang.marks = {"fault": time.monotonic()}
                os.kill(gang.locations[1].pid, case.signal)
        phases.append(durations(gang.marks))
        while gang.world_size < RANKS:
            time.sleep(0.1)
            gang.grow()
    return Outcome(phases, len(steps) - len(set(steps)), gang.call("fingerprint"))


def durations(marks: Mapping[str, float]) -> dict[str, float]:
    "Seconds of each phase, and of all."
    times = [marks[name] for name in ("fault", *PHASES)]
    return {name: end - begun for name, begun, end in zip(PHASES, times, times[1:])} | {"all": times[-1] - times[0]}


def ours() -> str:
    "A table of the phases."
    phases = " | ".join(PHASES)
    lines = [f"| fault | {phases} | all | aim | steps repeated | weights |", "| --- " * (len(PHASES) + 5) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        tolerance = Tolerance(max_restarts=1000, spares=1, hang_after=1.0)
        job, logs = make_job(Path(folder)), Path(folder, "logs")
        gang = WatchedGang(job, Workers(RANKS, 0.0, "gloo"), logs, tolerance, lambda text: None)
        try:
            wanted, step = healthy(gang)
            for case in CASES:
                gang.start(job, RANKS)
                spare = None if case.spare else gang.crew.take(UP)  # out of reach
                outcome = suffer(gang, case)
                lines.append(row(case, outcome, wanted))
                gang.crew.bench += [spare] if spare else []
        finally:
            gang.close()
    return "\n".join(lines) + f"\n\nA step of the healthy run: {1e3 * step:.0f} ms."


def row(case: Case, outcome: Outcome, wanted: list[str]) -> str:
    "A line of the table; a hang's time begins when it is noticed."
    hang = case.signal == signal.SIGSTOP
    total = [one["all"] - (one["noticed"] if hang else 0) for one in outcome.phases]
    cells = [f"{median(one[name] for one in outcome.phases):.2f}" for name in PHASES]
    if not hang and median(one["noticed"] for one in outcome.phases) > SEEN:
        cells[0] += f" MISSED: under {SEEN:g}"
    met = "under" if median(total) < case.target else "MISSED: under"
    weights = "bit for bit" if outcome.prints == wanted else "equal up to rounding" if not case.wait else "DIFFER"
    return (
        f"| {case.name} | {' | '.join(cells)} | {spread(total)}{' after it is noticed' if hang else ''} "
        f"| {met} {case.target:g} | {outcome.repeated} | {weights} |"
    )


def spread(values: Sequence[float]) -> str:
    "Median (range)."
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@dataclass(frozen=True)
class Step:
    "A line of a peer's diary: when a rank's step was done, and in which process."

    when: float
    pid: int
    number: int


def diary(folder: Path, rank: int) -> list[Step]:
    "All steps of a rank, whole lines only."
    file = folder / f"steps_{rank}"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [Step(float(when), int(pid), int(number)) for when, pid, number in map(str.split, lines)]


@dataclass(frozen=True)
class PeerOutcome:
    "Of a fault: seconds until any step was done again, until one that was new; and how many were done twice."

    any_step: float
    new_step: float
    repeated: int


def peer(module: str, launcher: list[str]) -> list[PeerOutcome]:
    "One run in which rank 1 is killed in the middle of several epochs."
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "MASTER_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    clean["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or gloo finds the addresses of the dead ones in the store
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, open(Path(name, "output"), "w") as output:
        folder = Path(name)
        command = [sys.executable, *(["-m", *launcher] if launcher else ["-m"]), f"benchmarks.peers.{module}", name]
        with subprocess.Popen(command, env=clean, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                return [peer_fault(folder, epoch, process) for epoch in range(1, PEER_FAULTS + 1)]
            finally:
                process.terminate()


def peer_fault(folder: Path, epoch: int, process: subprocess.Popen) -> PeerOutcome:
    "Kill rank 1 half-way through that epoch, and watch rank 0."
    middle = epoch * STEPS + STEPS // 2
    steps = await_(lambda: [step for step in diary(folder, 1) if step.number >= middle], folder, process)
    before, killed = {step.pid for step in diary(folder, 0)}, time.time()
    os.kill(steps[-1].pid, signal.SIGKILL)

    def again() -> list[Step]:
        return [step for step in diary(folder, 0) if step.pid not in before]

    first = await_(again, folder, process)[0]
    reached = max(step.number for step in diary(folder, 0) if step.pid in before)
    new = await_(lambda: [step for step in again() if step.number > reached], folder, process)[0]
    return PeerOutcome(first.when - killed, new.when - killed, reached + 1 - first.number)


def await_(look: Callable[[], list[Step]], folder: Path, process: subprocess.Popen) -> list[Step]:
    "What `look` finds, once it finds any; RuntimeError where the peer ends before."
    while not (found := look()):
        if process.poll() is not None:
            raise RuntimeError(f"the peer ended:\n{(folder / 'output').read_text()[-3000:]}")
        time.sleep(0.01)
    return found


def peers() -> str:
    "A table of all peers that are installed."
    missing = [name for name, (_, needed, _) in PEERS.items() if find_spec(needed) is None]
    lines = [
        "| | first step after the kill, s | first step not done before, s | steps repeated |",
        "| --- | --- | --- | --- |",
    ]
    for name, (module, _, launcher) in PEERS.items():
        if name not in missing:
            faults = [fault for _ in range(PEER_RUNS) for fault in peer(module, launcher)]
            lines.append(
                f"| {name} | {spread([fault.any_step for fault in faults])} "
                f"| {spread([fault.new_step for fault in faults])} | {sorted(f.repeated for f in faults)} |"
            )
    if missing:
        lines.append(f"\nNot installed here, so not measured (`pip install '.[peers]'`): {', '.join(missing)}.")
    return "\n".join(lines)


def run() -> str:
    "Both tables."
    return f"""\
`simple_cnn` at {SIZE} px, global batch {BATCH}, SGD with momentum, {RANKS} CPU workers of one thread each,
{STEPS} steps an epoch; rank 1 gets the signal from outside, in the middle of an epoch. Seconds; medians (range) of
{FAULTS} faults. Ours, phase by phase: until the driver hears of the first failure (deaths: under {SEEN:g});
until all others have left the collective and the last completed step is agreed on; until another process has the seat;
until the new group is formed and has the state; until a new step is reported.

{ours()}

The peers on the same fault (killed), with a checkpoint after each of {EPOCHS} epochs, and data that lies in memory:
Runs: {PEER_RUNS}, of {PEER_FAULTS} faults each. All of their workers begin again at the newest checkpoint they know of.
torchrun is given TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without it, torch 2.13's restarted workers meet in the store of
those before them, read addresses that are gone, fail until --max-restarts is used up, and then hang.

{peers()}
"""


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["chaos"])
