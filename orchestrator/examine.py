"Examine: a finished run's model over a dataset, by a gang, each image once; what evaluate and interpret share."

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from learner.data.files import Labelled, Vocab, list_files
from learner.data.labels import label_all
from learner.data.splitters import grandparent, has_parts
from learner.errors import UsageError, UserError
from learner.interpret import Outcomes
from orchestrator.build import check_batch_size, make_gang, open_data, visible_devices
from orchestrator.config import Config
from orchestrator.loaded_run import CONFIG, LoadedRun
from orchestrator.measure import measure, measuring_job
from orchestrator.run_arguments import GANG

# what is done as the run did it
SAVED = ("data", "data_dir", "split", "label_regex", "labels_csv", "bad_images", "batch_size", "seed", "precision")


@dataclass(frozen=True)
class Examined:
    "What the model of `run` made of the images `labelled`; `bad`: those that could not be read, and why."

    run: LoadedRun
    labelled: Labelled
    outcomes: Outcomes
    bad: list[tuple[str, str]]

    @cached_property
    def confusion(self) -> Tensor:
        "How often each class (row) was taken for each (column): int64 (classes, classes)."
        return self.outcomes.confusion(len(self.run.classes))

    def mention_bad(self) -> None:
        "Print the files that were left out, if there were."
        if self.bad:
            print(f"\n{len(self.bad)} unreadable images were left out:")
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
        places = [Path(one).expanduser().absolute() for one in (Config(**saved).data, given.get("data", saved["data"]))]
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    other = places[0] != places[1]
    dropped = {"split", "labels_csv"} if other else set()
    if given.keys() & {"label_regex", "labels_csv"}:
        dropped |= {"label_regex", "labels_csv"}
    kept = {name: value for name, value in saved.items() if name not in dropped}
    changes = {name: given[name] for name in (*GANG, "debug") if name in given}
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
