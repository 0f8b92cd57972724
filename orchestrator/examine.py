"Examine: a finished run's model over a dataset, by a gang, each image once; what evaluate and interpret share."

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from cluster.gang import Gang
from cluster.messages import Job, Report
from learner.data.files import Labelled, Vocab, list_files
from learner.data.labels import label_all
from learner.data.splitters import grandparent, has_parts
from learner.data.warp import AugmentConfig
from learner.errors import UsageError, UserError
from learner.interpret import Outcomes
from learner.reading import absolute
from orchestrator.build import check_batch_size, make_gang, open_data, visible_devices
from orchestrator.command_line import EXAMINE
from orchestrator.config import Config
from orchestrator.driver import Pace, Plan
from orchestrator.loaded_run import LoadedRun
from orchestrator.run_folder import CONFIG
from orchestrator.summary import unreadable
from orchestrator.terminal import Terminal

Bad = list[tuple[str, str]]

# what is done as the run did it
SAVED = ("data", "data_dir", "split", "label_regex", "labels_csv", "bad_images", "batch_size", "seed", "precision")


@dataclass(frozen=True)
class Examined:
    "What the model of `run` made of the images `labelled`; `bad`: those that could not be read, and why."

    run: LoadedRun
    labelled: Labelled
    outcomes: Outcomes
    bad: Bad

    @cached_property
    def confusion(self) -> Tensor:
        "How often each class (row) was taken for each (column): int64 (classes, classes)."
        return self.outcomes.confusion(len(self.run.classes))

    def mention_bad(self) -> None:
        "Print what the numbers don't tell: how many images have no prediction, and the files that were left out."
        if unknown := int(self.outcomes.losses.isnan().sum()):
            print(
                f"\n{unknown} images have no prediction, since the model's outputs are no numbers, as after "
                "divergence: they count as wrong, and are in no table of classes"
            )
        if self.bad:
            print(f"\n{unreadable(len(self.bad))} left out:")
            print("\n".join(f"{file}: {reason}" for file, reason in self.bad))


def examine(given: Mapping[str, Any], name: str) -> Examined:
    """Measure the run `given["run"]` as the command line `given` says; workers' logs go to its folder `name`.

    Raises UsageError before anything is started, UserError where something fails later.
    """
    run = LoadedRun.open(given["run"])
    config, whole = configured(run, given)
    devices = visible_devices(config)
    check_batch_size(config, devices)
    labelled, place = measured_images(run, config, whole)
    job = measuring_job(run, labelled, config.batch_size, 5, config.precision, config.bad_images == "skip")
    print(f"{run}\n{len(labelled)} images, {place}\nstarting {devices} ...\n", flush=True)
    logs = run.path / name / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    gang = make_gang(job, devices, config, logs)
    try:
        outcomes, bad = measure(gang, job)
    finally:
        gang.close()
    if not len(outcomes):
        raise UserError(f"none of the {len(bad)} images could be read; the first, {bad[0][0]}: {bad[0][1]}")
    return Examined(run, labelled, outcomes, bad)


def configured(run: LoadedRun, given: Mapping[str, Any]) -> tuple[Config, bool]:
    """The run's Config as far as it matters here, changed as `given` says.

    And whether all images are meant where the data have no parts: of other data than the run's, not split otherwise.
    """
    file, settings = run.path / CONFIG, run.settings()
    if missing := {"data", "seed"} - settings.keys():
        raise UsageError(f"{file} has no {min(missing)!r}; restore the file, or name another run")
    saved = {name: settings[name] for name in SAVED if name in settings}
    try:
        places = [absolute(one) for one in (Config(**saved).data, given.get("data", saved["data"]))]
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    other = places[0] != places[1]
    dropped = {"split", "labels_csv"} if other else set()
    if given.keys() & {"label_regex", "labels_csv"}:
        dropped |= {"label_regex", "labels_csv"}
    kept = {name: value for name, value in saved.items() if name not in dropped}
    changes = {name: given[name] for name in (*EXAMINE, "debug") if name in given}
    return Config(**{**kept, **changes}), other and "split" not in given


def measured_images(run: LoadedRun, config: Config, whole: bool) -> tuple[Labelled, str]:
    "The images to measure on, with the run's class numbers, and which they are in words."
    root, block = open_data(config)
    if not whole:
        split = block.open(root)
        files, labels = split.valid.files, [split.vocab.classes[target] for target in split.valid.targets]
    else:
        found, names = list_files(root, block.get_items)
        whole = not has_parts(names)
        chosen = range(len(names)) if whole else grandparent(names, block.get_y)[1]
        files, labels = tuple(found[i] for i in chosen), label_all([names[i] for i in chosen], block.get_y)
    place = f"all of {root}" if whole else f"the validation part of {root}"
    return Labelled(files, tuple(Vocab(run.classes).encode(files, labels))), place


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
