"What the driver costs: an epoch of steps of about 1 ms that it coordinates, and its own use of the processor."

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import interleaved, quotients, shown
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang, Workers
from learner.data.files import Labelled
from learner.data.normalize import Normalize
from orchestrator.driver import Pace, Place, Plan, one_pass
from orchestrator.run_folder import RunFolder
from orchestrator.tally import Tally
from orchestrator.terminal import Terminal
from orchestrator.tracker import Tracker

STEPS, FEWER, ROUNDS, SIZE, MANY = 400, 150, 24, 8, 16


def tiny_job(folder: Path, batch_size: int, steps: int = STEPS) -> Job:
    "`steps` batches an epoch of pictures of 8 pixels, in a store; the same 64 files over and over."
    rng, files = np.random.default_rng(0), [str(folder / f"{number}.png") for number in range(64)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)
    n = steps * batch_size
    train = Labelled(tuple(files * (n // 64 + 1))[:n], (tuple(range(10)) * (n // 10 + 1))[:n])
    return Job(train=train, valid=Labelled(tuple(files[:10]), tuple(range(10))), n_classes=10, arch="linear", size=SIZE,
               presize=SIZE, batch_size=batch_size, seed=0, normalize=Normalize((0.5,) * 3, (0.25,) * 3),
               augment="none", sync_batchnorm=True, skip_bad_images=False, store=f"{folder}/stores/tiny")  # fmt: skip


class Coordinated:
    "Epochs through the driver's own loop: chunks, reports, tally, TensorBoard."

    def __init__(self, gang: RayGang, job: Job, folder: Path) -> None:
        n_train, n_valid = len(job.train), len(job.valid)
        self.plan = Plan(
            n_train=n_train, n_valid=n_valid, batch_size=job.batch_size, epochs=10_000, schedule="one_cycle", lr=0.01
        )
        self.gang, self.tracker = gang, Tracker(RunFolder.create(folder), Terminal())
        self.pace, self.epoch = Pace(), 0

    def __call__(self) -> Tally:
        "One epoch."
        tally = one_pass(self.plan, self.gang, self.tracker, True, Place(self.epoch), self.pace)
        self.epoch += 1
        return tally


def contest(gang: RayGang, folder: Path) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of an epoch on two workers, coordinated, and as one single chunk; and how much more of the driver's
    processor time the first takes, round by round: the workers lose it, and it varies far less than the seconds do."""
    job = tiny_job(folder, 8)
    gang.start(job, 2)
    coordinated, free = Coordinated(gang, job, folder / "runs"), Chunk(True, 0, 0, 0, ({"lr": 0.01},) * STEPS)
    alternatives: dict[str, Any] = {"coordinated": coordinated, "free": lambda: gang.call("run", free)}
    busy: dict[str, list[float]] = {name: [] for name in alternatives}

    def measured(name: str) -> None:
        before = time.process_time()
        alternatives[name]()
        busy[name].append(time.process_time() - before)

    seconds = interleaved({name: partial(measured, name) for name in alternatives}, ROUNDS)
    return seconds, [a - b for a, b in zip(busy["coordinated"][1:], busy["free"][1:])]


def share_of_a_core(gang: RayGang, folder: Path) -> tuple[float, float]:
    "The driver's processor time over the time that passed, with many tiny workers; and milliseconds a step."
    job = tiny_job(folder, MANY, FEWER)
    gang.start(job, MANY)
    coordinated = Coordinated(gang, job, folder / "runs")
    coordinated()  # fills the store, and learns the pace
    busy, started = time.process_time(), time.perf_counter()
    coordinated()
    seconds = time.perf_counter() - started
    return (time.process_time() - busy) / seconds, seconds / FEWER * 1e3


def run() -> str:
    "Both measurements."
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        gang = RayGang(tiny_job(Path(one), MANY), Workers(MANY, 0.0, "gloo"), Path(one, "logs"))
        try:
            seconds, more = contest(gang, Path(one))
            share, each = share_of_a_core(gang, Path(other))
        finally:
            gang.close()
    step = sorted(seconds["free"])[ROUNDS // 2] / STEPS * 1e3
    ratio = shown(quotients(seconds, "coordinated", "free"), 3)
    spent = shown([100 * a / (2 * b) for a, b in zip(more, seconds["free"])], 1)
    return f"""\
| | measured | aim |
| --- | --- | --- |
| time of {STEPS} steps of {step:.2f} ms by the driver, over the same steps as one message | {ratio} | 1.03 |
| processor time of the driver for these, of what two cores have in them, in % | {spent} | 3 |
| the driver's share of a core, with {MANY} workers whose step takes {each:.1f} ms | {100 * share:.1f}% | 10% |

`linear`, pictures of {SIZE} pixels from a store, batch 8 by two CPU workers (first lines, {ROUNDS} interleaved rounds),
batch {MANY} by {MANY} (last).
"""
