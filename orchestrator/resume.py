"Saving where a run stands, as JSON beside a checkpoint's tensors, and finding it again where the run is to go on."

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.checkpoint import Checkpoint, Checkpoints, spoiled
from cluster.messages import Job
from cluster.rank_learner import METRICS
from learner.data.files import Split
from learner.errors import UsageError, printable, shown
from learner.reading import absolute, expanded
from orchestrator.config import Config, flag
from orchestrator.driver import Place, Plan
from orchestrator.loaded_run import read_normalize, read_object
from orchestrator.run_folder import CONFIG, HISTORY, LR_CURVE, versions
from orchestrator.tally import Tally

CHECKPOINTS = "checkpoints"
FREE = {  # options that may be others than those that the run was begun with
    "gpus", "cpus", "local", "address", "backend", "runs", "name", "data_dir", "cache", "debug", "resume", "autoresume",
    "keep", "bad_images", "max_restarts", "min_workers", "wait_for_workers", "spares", "hang_after", "on_nan",
}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    "Where a run stands: its place in time, the rows of the epochs that are done, and the peak rate."

    place: Place = field(default_factory=Place)
    rows: tuple[dict[str, Any], ...] = ()
    lr: float | None = None

    def as_json(self) -> dict[str, Any]:
        "For a checkpoint's meta.json."
        tally = self.place.tally.as_json() if self.place.tally else None
        return {"epoch": self.place.epoch, "batch": self.place.batch, "tally": tally, "rows": self.rows, "lr": self.lr}

    @property
    def best_epochs(self) -> int:
        "After how many epochs the accuracy was the highest so far; 0 where none is done."
        return max(self.rows, key=lambda row: row["accuracy"])["epoch"] + 1 if self.rows else 0

    @classmethod
    def of_json(cls, meta: Mapping[str, Any]) -> Standing:
        "What `as_json` wrote; ValueError, TypeError, KeyError, OverflowError or AttributeError where it did not."
        tally = Tally.of_json(meta["tally"]) if meta["tally"] else None
        place = Place(int(meta["epoch"]), int(meta["batch"]), tally)
        return cls(place, tuple(map(_row, meta["rows"])), float(meta["lr"]))


def _row(saved: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: math.nan for name in METRICS if name != "accuracy"} | dict(saved)  # which may be new
    if not all(type(row[key]) in (int, float) for key in HISTORY):
        raise ValueError("a row of the history is not of numbers")
    return row


class Saver:
    """Writes checkpoints in the background, one at a time, but none with numbers that are not finite: a dead end.

    Then, and where the disk refuses, `warn` is told in one sentence, and training goes on.
    """

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], object]) -> None:
        self.checkpoints, self.warn = checkpoints, warn
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[bool] | None = None
        self._written = True

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], best: int = 0) -> None:
        """Begin to write the checkpoint of `step`, once the one before is written; the arrays are not to change.

        That of the step `best` is kept.
        """
        self.finish()
        self._last = self._thread.submit(self._write, step, tensors, meta, best)

    def finish(self) -> bool:
        "Wait until all is written; whether the last checkpoint was."
        if last := self._last:
            self._last, self._written = None, False  # what it raises, it raises once: the next is tried again
            self._written = last.result()
        return self._written

    def close(self) -> None:
        "Write what is left to write."
        self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], best: int) -> bool:
        try:
            if name := spoiled(tensors):
                self.warn(
                    f"warning: no checkpoint of step {step} is written: {name} is not finite; older ones are kept"
                )
                return False
            self.checkpoints.save(step, tensors, meta, best)
            return True
        except (OSError, MemoryError) as error:
            why = str(error) or "not enough memory"
            self.warn(f"warning: no checkpoint of step {step} could be written: {why}")
            return False


def standing_of(checkpoint: Checkpoint, plan: Plan) -> Standing:
    "Where `plan` stood; UsageError where the checkpoint is not of such a run, however sound it is."
    try:
        standing = Standing.of_json(checkpoint.meta)
        place, n = standing.place, plan.train_batches
        fits = 0 <= place.epoch == len(standing.rows) <= plan.epochs and 0 <= place.batch <= n
        if not fits or place.epoch * n + place.batch != checkpoint.step or not 0 < (standing.lr or 0) < math.inf:
            raise ValueError(f"epoch {place.epoch}, batch {place.batch} and rate {standing.lr} are not of this run")
        return standing
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"checkpoint {checkpoint.folder} does not say where the run stood ({shown(repr(error))}); remove it to go "
            "on from the one before, or leave --resume out to begin anew"
        ) from error


def find_run(config: Config, parent: Path) -> Path | None:
    """The run directory that `--resume` or `--autoresume` means, or the newest in it; None where a run is to begin.

    Raises UsageError where there is none to resume, or where it was asked for other things than now.
    """
    if config.resume is None and not config.autoresume:
        return None
    place = parent if config.resume in (None, "last") else expanded(str(config.resume))
    found = place if (place / CONFIG).is_file() else newest_run(place) or place
    if not (found / CONFIG).is_file():
        if Checkpoints(found / CHECKPOINTS).steps():
            raise UsageError(
                f"{found} has checkpoints, but no {CONFIG} that says of what: put it back, or remove the run"
            )
        if config.autoresume:
            return None
        raise UsageError(f"--resume {config.resume}: there is no run in {found}; leave the flag out to begin one")
    _refuse_changes(config, found)
    return found


def newest_run(parent: Path) -> Path | None:
    "The newest version below `parent`, if there is one; what find_lr has left there is no run to go on with."
    there = [parent / f"version_{number}" for number in versions(parent)]
    runs = [one for one in there if (one / CHECKPOINTS).exists() or not (one / LR_CURVE).exists()]
    return runs[-1] if runs else None


def _refuse_changes(config: Config, run: Path) -> None:
    before = read_object(run / CONFIG)
    now = {**dataclasses.asdict(config), "data": absolute(config.data)}
    before |= {"data": absolute(f"{before.get('data', config.data)}")}
    if before.get("fine_tune"):  # older runs took these two, and did without
        before["schedule"] = config.schedule
    if before.get("moms"):
        before["momentum"] = config.momentum
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    if strict := [name for name in changed if name not in FREE]:
        told = ", and ".join(_difference(name, before[name], getattr(config, name)) for name in strict)
        way = "--autoresume" if config.resume is None else "--resume"
        raise UsageError(f"{run} was begun {told}; resume it with the same options, or leave {way} out to begin anew")


def _difference(name: str, before: Any, now: Any) -> str:
    if type(now) is bool:
        return f"{'without' if now else 'with'} {flag(name)}"
    return f"with {flag(name)} {shown(before)}, not {now}"


def found_data(split: Split, plan: Plan, root: Path) -> dict[str, Any]:
    "What a run has to find again where it goes on: config.json has it."
    return {"classes": split.vocab.classes, "steps_per_epoch": plan.train_batches, "images": split.digest(root)}


def seen_as_before(run: Path, job: Job) -> Job | None:
    """The job, with pictures as the run in that directory was begun with; None where config.json does not say how.

    Images that came or went since, or another model in the place that --init names, would change them in its midst.
    """
    before = read_object(run / CONFIG).get("found")
    if not isinstance(before, dict) or not {"channels", "normalize"} <= before.keys():
        return None
    return dataclasses.replace(job, channels=before["channels"], normalize=read_normalize(run / CONFIG, before))


def check_data(run: Path, found: Mapping[str, Any]) -> None:
    """Compare the data that was found with what the run in that directory was begun with, if that is known.

    UsageError where classes or steps would mean others than before; a warning where images came or went: some may have
    had to, since they could not be read.
    """
    before = read_object(run / CONFIG).get("found")
    if not isinstance(before, dict):
        return
    remedy = "put the data back as it was, or leave --resume out to begin anew"
    classes, now = before.get("classes"), found["classes"]
    if isinstance(classes, list) and classes != list(now):
        gone, new = sorted({*map(str, classes)} - {*now}), sorted({*now} - {*map(str, classes)})
        raise UsageError(f"{run} was begun with other classes: {shown(gone)} are gone, {shown(new)} are new; {remedy}")
    steps, images = before.get("steps_per_epoch"), before.get("images")
    if steps != found["steps_per_epoch"]:
        raise UsageError(
            f"{run} was begun with {shown(steps)} steps an epoch, and the images that there are now make "
            f"{found['steps_per_epoch']}; {remedy}"
        )
    if images != found["images"]:
        print(
            "warning: images or labels are not those that the run was begun with: it goes on with what is there",
            flush=True,
        )


def newest_checkpoint(run: Path, begin_again: bool) -> Checkpoint | None:
    """The newest sound checkpoint of a run, saying which ones are not; None where it never had one.

    Where it had some and all are broken, the run may `begin_again`, which is said, or UsageError is raised.
    """
    found, broken = Checkpoints(run / CHECKPOINTS).newest()
    for sentence in broken:
        print(f"warning: {printable(sentence)}", flush=True)
    if broken and found is None:
        if not begin_again:
            raise UsageError(f"no checkpoint of {run} can be used; to begin anew, leave --resume out")
        print(f"warning: no checkpoint of {run} can be used: the run begins again, at step 0", flush=True)
    return found
