"A session: all that a command needs to work with a gang, from the data to the workers, and its orderly end."

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.faults import WorkersFailed
from cluster.gang import Gang
from cluster.messages import Job
from learner.data.files import Split
from learner.errors import UsageError, UserError, shown
from learner.figures import image_grid, lr_curve
from learner.lr_range import RangeTest
from learner.models import named
from learner.optim import check_optimizer
from learner.reading import expanded
from orchestrator.build import (
    check_batch_size,
    make_gang,
    make_job,
    make_plan,
    make_store,
    open_data,
    visible_devices,
)
from orchestrator.config import Config
from orchestrator.devices import Devices
from orchestrator.driver import Plan
from orchestrator.initial import start_from
from orchestrator.phases import Phases
from orchestrator.range_test import range_test
from orchestrator.resume import (
    CHECKPOINTS,
    Saver,
    Standing,
    check_data,
    find_run,
    found_data,
    newest_checkpoint,
    seen_as_before,
    standing_of,
)
from orchestrator.run_folder import RunFolder
from orchestrator.summary import default_name, report_configuration
from orchestrator.terminal import Terminal
from orchestrator.tracker import Tracker

SAMPLES = 32  # training images that TensorBoard shows


@dataclass(frozen=True)
class Session:
    "The parts of a run, while its workers live."

    config: Config
    split: Split
    job: Job
    plan: Plan
    folder: RunFolder
    tracker: Tracker
    gang: Gang
    saver: Saver
    standing: Standing

    def save_checkpoint(self, standing: Standing, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        "Begin to write all that is needed to go on from there: these tensors, or else what the workers hold."
        step = standing.place.epoch * self.plan.train_batches + standing.place.batch
        best = standing.best_epochs * self.plan.train_batches
        self.saver.save(step, tensors or self.gang.call_first("snapshot"), standing.as_json(), best)

    def show_samples(self) -> None:
        "Put training images into TensorBoard as the model sees them, once training is under way."
        images, targets = self.gang.call_first("samples", SAMPLES)
        if len(images):
            titles = [self.split.vocab.classes[target] for target in targets]
            self.tracker.at_leisure.append(lambda: self.tracker.picture("train/samples", image_grid(images, titles)))

    def range_test(self) -> RangeTest:
        "The learning-rate range test across the gang, under a bar."
        self.tracker.terminal.open_bar(RangeTest.steps)
        test = range_test(self.plan, self.gang, self.tracker.terminal.advance)
        self.tracker.terminal.close_bar()
        return test

    def show_range_test(self, test: RangeTest, suggestion: float) -> None:
        "Put the LR finder's curve into TensorBoard."
        self.tracker.picture("lr_finder", lr_curve(test.lrs, test.losses, test.smoothed, suggestion))

    def model(self) -> dict[str, np.ndarray]:
        "The model's tensors as the workers hold them now."
        return self.gang.call_first("state")

    def best_model(self) -> dict[str, np.ndarray] | None:
        "Of a run that is resumed, the model of the best epoch, out of its checkpoint; None if that is not sound."
        try:
            best = self.saver.checkpoints.load(self.standing.best_epochs * self.plan.train_batches)
        except UserError:
            return None
        now = self.gang.call_first("snapshot")
        load(self.gang, best)
        model = self.model()
        self.gang.call("load", now)
        return model

    def save_model(self, tensors: dict[str, np.ndarray]) -> None:
        "Write the model and what prediction needs to know of it."
        self.folder.write_model(tensors, self._about())

    def reserve_model(self) -> None:
        "Take room on the disk for the model."
        self.folder.reserve_model(self.model(), self._about())

    def _about(self) -> dict[str, Any]:
        return {
            "arch": self.job.arch,
            "classes": self.split.vocab.classes,
            "channels": self.job.channels,
            "size": self.job.size,
            "presize": self.job.presize,
            "valid_crop": self.job.augmentation.valid_crop if self.job.augment == "full" else 0.0,
            "normalize": self.job.normalize.as_json(),
        }


@dataclass(frozen=True)
class Prepared:
    "What is known before the workers start; `checkpoint` is where they go on, in a run that was `begun` before."

    devices: Devices
    split: Split
    job: Job
    plan: Plan
    folder: RunFolder
    begun: bool
    checkpoint: Checkpoint | None
    standing: Standing


@contextmanager
def prepared(config: Config, again: bool) -> Iterator[Prepared]:
    """Refuse what can't be, find the data, find or make the run directory, and say what the run is, but not `again`.

    The directory is ours meanwhile. One that was made for a run of which no worker started is gone afterwards: it would
    be the newest of its name, and so what `--resume last` goes on with.
    """
    named(config.arch)
    check_optimizer(config.optimizer)
    devices = visible_devices(config)
    check_batch_size(config, devices)
    parent = expanded(config.runs) / (config.name or default_name(config))
    run = find_run(config, parent)
    root, block = open_data(config)
    split = block.open(root)
    job, plan = make_job(config, split), make_plan(config, split)
    found = found_data(split, plan, root)
    if run:
        check_data(run, found)
    checkpoint = newest_checkpoint(run, config.autoresume) if run else None
    job, started_from = _started(config, job, split, run if checkpoint else None)
    standing = standing_of(checkpoint, plan) if checkpoint else Standing()
    folder = RunFolder(run) if run else RunFolder.create(parent)
    try:
        folder.claim()
        if run:
            folder.sweep()  # first: on a full disk, what was reserved there is the room to go on in
        found |= {"channels": job.channels, "normalize": job.normalize.as_json()}
        report_configuration(config, devices, split, plan, folder, job.channels, found, quiet=again)
        job = dataclasses.replace(job, store=make_store(config, split, job.channels))
        if started_from:
            print(started_from, end="\n\n")
        if run:
            folder.write_history(standing.rows)
            print(f"going on at step {checkpoint.step if checkpoint else 0} of {plan.steps}\n")
        yield Prepared(devices, split, job, plan, folder, run is not None, checkpoint, standing)
    finally:
        if not run:
            folder.remove_unless_begun()
        folder.release()


def _started(config: Config, job: Job, split: Split, run: Path | None) -> tuple[Job, str]:
    "The job with what it starts from, and a sentence on that; or as `run`, which is resumed, has it."
    if run and (before := seen_as_before(run, job)):
        return before, ""
    return start_from(config.init, job, split.vocab.classes) if config.init is not None else (job, "")


@contextmanager
def open_session(config: Config, again: bool = False) -> Iterator[Session]:
    """Prepare, then start the workers; `again` for one that this process has begun before.

    Raises UsageError before anything is started, and leaves nothing written then; UserError where something fails
    later. On leaving, the workers are stopped and what was recorded is on disk.
    """
    phases = Phases()
    phases.done("import")
    with prepared(config, again) as ready:
        folder, checkpoint = ready.folder, ready.checkpoint
        first_step = (checkpoint.step if checkpoint else 0) if ready.begun else None
        tracker = Tracker(folder, Terminal(), first_step)
        phases.done("data")
        try:
            print(f"starting {ready.devices} ...\n", flush=True)
            gang = make_gang(ready.job, ready.devices, config, folder.logs, tracker.fault, phases.done, again=again)
            tracker.phases = None if again else phases
            saver = Saver(Checkpoints(folder.path / CHECKPOINTS, config.keep), tracker.terminal.write)
            try:
                if checkpoint:
                    load(gang, checkpoint)
                yield Session(config, ready.split, ready.job, ready.plan, folder, tracker, gang, saver, ready.standing)
                saver.finish()  # what went wrong in the last checkpoint is heard here
            except (UserError, OSError, MemoryError) as error:
                tracker.log_fault(f"stopped: {error}")
                raise
            finally:
                saver.close()
                gang.close()
        finally:
            tracker.close()


def load(gang: Gang, checkpoint: Checkpoint) -> None:
    "Give the workers what the checkpoint holds; UsageError where it is another model's."
    try:
        gang.call("load", checkpoint.tensors)
    except UserError as error:
        if isinstance(error, WorkersFailed) and error.failures[0].kind != "user":
            raise
        raise UsageError(
            f"checkpoint {checkpoint.folder} does not fit this run: {shown(str(error))}; remove it, or leave --resume "
            "out to begin anew"
        ) from error
