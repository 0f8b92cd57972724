"From a finished run to the work of a gang: its model over a list of images, each counted once."

from __future__ import annotations

from collections.abc import Iterator

from cluster.gang import Gang
from cluster.messages import Job, Report
from learner.data.files import Labelled
from learner.data.warp import AugmentConfig
from learner.errors import UserError
from learner.interpret import Outcomes
from orchestrator.driver import Pace, Plan
from orchestrator.loaded_run import LoadedRun
from orchestrator.terminal import Terminal

Bad = list[tuple[str, str]]


def measuring_job(run: LoadedRun, labelled: Labelled, batch_size: int, k: int, precision: str, skip_bad: bool) -> Job:
    "What workers are told: no training set, these images to validate on, the run's weights, and to keep outcomes."
    return Job(
        train=Labelled((), ()),
        valid=labelled,
        n_classes=len(run.classes),
        arch=run.arch,
        channels=run.channels,
        size=run.size,
        presize=run.presize,
        batch_size=batch_size,
        seed=0,
        normalize=run.normalize,
        # full is the mode that resamples what validation crops; measuring uses nothing else of it
        augment="full" if run.valid_crop else "none",
        augmentation=AugmentConfig(valid_crop=run.valid_crop),
        sync_batchnorm=False,
        skip_bad_images=skip_bad,
        precision=precision,
        weights=run.arrays(),
        outcomes=k,
    )


def stream(gang: Gang, job: Job) -> Iterator[list[Report]]:
    "Go through the images once, below a progress bar: the reports of all ranks, chunk by chunk."
    n = len(job.valid)
    plan = Plan(n_train=0, n_valid=n, batch_size=job.batch_size, epochs=1, schedule="constant", lr=0.0)
    terminal, pace, done = Terminal(), Pace(), 0
    terminal.open_bar(plan.valid_batches)
    try:
        for reports in gang.stream(plan.chunks(False, 0, pace)):
            pace.learn(reports)
            done += len(reports[0].chunk.hypers)
            terminal.advance(done)
            yield reports
    finally:
        terminal.clear()


def measure(gang: Gang, job: Job) -> tuple[Outcomes, Bad]:
    "The outcome of each image, and file and reason of those that could not be read; UserError if one is missing."
    parts: list[Outcomes] = []
    bad: Bad = []
    for reports in stream(gang, job):
        parts += [report.outcomes for report in reports if report.outcomes is not None]
        bad += [image for report in reports for image in report.bad_images]
    outcomes, n = Outcomes.join(parts), len(job.valid)
    if len(outcomes) + len(bad) != n:
        raise UserError(f"{len(outcomes)} of {n} images were counted: this is a bug, please report it")
    return outcomes, bad
