"What the driver costs: an epoch of steps of about 1 ms that it coordinates, and its own use of the processor."

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import aim, interleaved, quotients, shown
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang, Workers
from learner.data.files import Labelled
from learner.data.normalize import Normalize
from orchestrator.driver import Pace, Place, Plan, one_pass
from orchestrator.run_folder import RunFolder
from orchestrator.tally import Tally
from orchestrator.terminal import Terminal
from orchestrator.tracker import Tracker

FEWER, ROUNDS, SIZE, BATCH, MANY = 150, 24, 8, 8, 16
STEPS = {1: 800, 2: 300}  # by workers: of about 1 ms each, and of 2.5, since two have to talk in each


def tiny_job(folder: Path, batch_size: int, steps: int) -> Job:
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


def contest(gang: RayGang, folder: Path, workers: int) -> str:
    """Rows of the table: an epoch that is coordinated, and the same as one single chunk.

    Their seconds, and how much more of the driver's processor time the first takes, round by round: the workers lose
    it, and it varies far less than the seconds do.
    """
    steps = STEPS[workers]
    job = tiny_job(folder, BATCH, steps)
    gang.start(job, workers)
    coordinated, free = Coordinated(gang, job, folder / "runs"), Chunk(True, 0, 0, 0, ({"lr": 0.01},) * steps)
    alternatives: dict[str, Any] = {"coordinated": coordinated, "free": lambda: gang.call("run", free)}
    busy: dict[str, list[float]] = {name: [] for name in alternatives}

    def measured(name: str) -> None:
        before = time.process_time()
        alternatives[name]()
        busy[name].append(time.process_time() - before)

    seconds = interleaved({name: partial(measured, name) for name in alternatives}, ROUNDS)
    more = [a - b for a, b in zip(busy["coordinated"][1:], busy["free"][1:])]
    each = statistics.median(seconds["free"]) / steps * 1e3
    ratios = quotients(seconds, "coordinated", "free")
    micros = shown([one / steps * 1e6 for one in more], 0)
    shares = [100 * a / (2 * b) for a, b in zip(more, seconds["free"])]
    what = f"{steps} steps of {each:.2f} ms by {workers} worker{'s' * (workers > 1)}"
    return f"""\
| {what}: by the driver, over the same steps as one message | {shown(ratios, 3)} | {aim(1.03, ratios)} |
| the driver's processor time for these, in us a step | {micros} | |
| the same, of what two cores have in them, in % | {shown(shares, 1)} | {aim(3, shares)} |"""


def share_of_a_core(gang: RayGang, folder: Path) -> tuple[float, float]:
    "The driver's processor time in percent of the time that passed, with many tiny workers; and milliseconds a step."
    job = tiny_job(folder, MANY, FEWER)
    gang.start(job, MANY)
    coordinated = Coordinated(gang, job, folder / "runs")
    coordinated()  # fills the store, and learns the pace
    busy, started = time.process_time(), time.perf_counter()
    coordinated()
    seconds = time.perf_counter() - started
    return 100 * (time.process_time() - busy) / seconds, seconds / FEWER * 1e3


def run() -> str:
    "All measurements."
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        gang = RayGang(tiny_job(Path(one), MANY, FEWER), Workers(MANY, 0.0, "gloo"), Path(one, "logs"))
        try:
            rows = "\n".join(contest(gang, Path(one), workers) for workers in STEPS)
            percent, each = share_of_a_core(gang, Path(other))
            share = f"{percent:.1f} | {aim(10, [percent])}"
        finally:
            gang.close()
    return f"""\
| | measured | aim |
| --- | --- | --- |
{rows}
| the driver's share of a core, in %, with {MANY} workers whose step takes {each:.1f} ms | {share} |

`linear`, pictures of {SIZE} pixels from a store, batch {BATCH} ({ROUNDS} interleaved rounds); {MANY} by
{MANY} workers (last line).
"""
