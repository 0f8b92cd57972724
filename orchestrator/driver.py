"The driver: it owns time, that is the steps, the schedule, and when to validate."

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.faults import NotFinite, WorkersFailed
from cluster.gang import Gang
from cluster.messages import Chunk, Report
from cluster.not_finite import ADVICE
from cluster.shards import n_batches
from learner.data.sizes import Sizes
from learner.errors import UserError
from learner.optimizer import spread
from learner.schedule import SCHEDULES, fine_tuning, fine_tuning_momentum, one_cycle_momentum
from orchestrator.tally import Tally, spoiled_steps
from orchestrator.tracker import Tracker

SAVE_EVERY = 60.0  # seconds after which a checkpoint is due in the midst of an epoch, too
CHEAP = 0.6  # seconds of a pause for one; where it takes longer, they come as much less often: 1% of the time at most

OnEpoch = Callable[[dict[str, Any]], bool]
OnPause = Callable[["Place"], object]
Halt = Callable[[], bool]


def never() -> bool:
    "A `stop` that lets the run go on."
    return False


@dataclass(frozen=True)
class Place:
    "Where a run stands in time: `batch` batches of `epoch` are trained, and `tally` is what they came to."

    epoch: int = 0
    batch: int = 0
    tally: Tally | None = None


class Stopped(Exception):
    "The run ended at `place`: it was asked to stop, or workers or numbers failed, which is the `cause`."

    def __init__(self, place: Place, cause: UserError | None = None) -> None:
        super().__init__()
        self.place, self.cause = place, cause


@contextmanager
def standing_at(place: Place) -> Iterator[None]:
    "Whatever stops the run herein, it stands at `place`: what is done here comes to nothing, or is done by then."
    try:
        yield
    except (Stopped, WorkersFailed) as ended:
        cause = ended.cause if isinstance(ended, Stopped) else ended
        raise Stopped(place, cause) from cause


@dataclass(frozen=True, kw_only=True)
class Plan:
    "The clock of a run: how many samples, batches and epochs, and the rate at each step."

    n_train: int
    n_valid: int
    batch_size: int
    epochs: int
    schedule: str
    lr: float
    momentum: float = 0.0
    momentums: tuple[float, float, float] | None = None
    sizes: Sizes | None = None
    frozen_epochs: int = 0
    skips_nan: bool = False
    body_share: float = 1.0

    @property
    def train_batches(self) -> int:
        "Steps in an epoch."
        return n_batches(self.n_train, self.batch_size)

    @property
    def valid_batches(self) -> int:
        "Batches in a validation."
        return n_batches(self.n_valid, self.batch_size)

    @property
    def steps(self) -> int:
        "Steps in the run."
        return self.train_batches * self.epochs

    def hypers(self, step: int) -> dict[str, float]:
        "The hyperparameters of a step: a pure function of its number."
        pct = step / self.steps
        hypers = self._fine_tuning(step) if self.frozen_epochs else self.rates(SCHEDULES[self.schedule](pct, self.lr))
        if self.sizes is not None and len(self.sizes.sides) > 1:
            hypers["size"] = self.sizes.at(pct)
        if self.momentums is not None:
            return hypers | {"momentum": self._momentum(step, self.momentums)}
        return hypers | ({"momentum": self.momentum} if self.momentum else {})

    def rates(self, lr: float) -> dict[str, float]:
        "The rates of a step whose head is trained at `lr`; in fine-tuning, of one whose body is frozen."
        share = 0.1 if self.frozen_epochs else self.body_share
        return {"lr": lr} | ({"body_lr": lr * share} if share != 1 else {})

    def _momentum(self, step: int, momentums: tuple[float, float, float]) -> float:
        if self.frozen_epochs:
            return fine_tuning_momentum(step, self.frozen_epochs * self.train_batches, self.steps, momentums)
        return one_cycle_momentum(step / self.steps, momentums)

    def _fine_tuning(self, step: int) -> dict[str, float]:
        frozen = self.frozen_epochs * self.train_batches
        body, head = spread(fine_tuning(step, frozen, self.steps, self.lr), 2)
        return {"lr": head, "body_lr": body} | ({"frozen": 1.0} if step < frozen else {})

    def chunks(self, train: bool, epoch: int, pace: Pace, first: int = 0, stop: Halt = never) -> Iterator[Chunk]:
        "The batches of a pass from `first` on, as chunks of the length that `pace` likes, until `stop()`."
        n = self.train_batches if train else self.valid_batches
        while first < n and not stop():
            batches = range(first, min(n, first + pace.length))
            step = epoch * self.train_batches + (first if train else self.train_batches)
            hypers = tuple(self.hypers(step + i) if train else {} for i in range(len(batches)))
            yield Chunk(train, epoch, first, step, hypers)
            first = batches.stop


class Pace:
    """How many batches a chunk should have, learnt from how long they take.

    Long enough (`seconds`) that the messages cost nothing, short enough that the bar moves and Ctrl-C is quick.
    """

    seconds = 0.3

    def __init__(self) -> None:
        self.length = 1

    def learn(self, reports: Sequence[Report]) -> None:
        "Take the time of a chunk; the length grows at most fourfold at once."
        each = max(report.step_seconds for report in reports)
        self.length = max(1, min(4 * self.length, round(self.seconds / max(each, 1e-6)), 1000))


class Spoiled(NotFinite):
    "The driver found numbers that are not finite in a `step`: by then workers hold them, and are steps ahead."

    def __init__(self, what: str, step: int, files: str = "") -> None:
        super().__init__(what + (f", in the batch of {files}" if files else "") + f"; {ADVICE}")
        self.what, self.step = what, step


class AllSkipped(NotFinite):
    "No step of an epoch came to anything: there is nothing behind it to go on from."


class Replicas(UserError):
    "Ranks that should hold the same numbers do not."


def fingerprint(gang: Gang, when: str) -> str:
    "The checksum that all ranks agree on; raises Replicas, naming the ranks that differ from most."
    prints = gang.call("fingerprint")
    common = max(prints, key=prints.count)
    if strays := [rank for rank, one in enumerate(prints) if one != common]:
        first = first_difference(gang.call("checksums"))
        who = f"ranks {strays} do not hold what the others hold ({common})"
        if any(prints.count(one) == prints.count(common) for one in prints if one != common):
            who = "as many hold one thing as another, so that nobody can tell which ranks are wrong"
        raise Replicas(
            f"replicas differ {when}, first in {first}: {who}: {prints}; --resume last goes back to the last "
            "checkpoint, where they agree. If it comes again, sum what workers make of their own samples over them all"
        )
    return common


def first_difference(checksums: Sequence[Mapping[str, str]]) -> str:
    "The name of the first tensor whose checksum is not the same on all ranks."
    names = [name for name in checksums[0] if len({one.get(name) for one in checksums}) > 1]
    number, _, name = names[0].partition("/") if names else ("", "", "a tensor that not all have")
    return {"0": name, "1": f"the optimizer's {name}"}.get(number, name)


def one_pass(
    plan: Plan, gang: Gang, tracker: Tracker, train: bool, place: Place, pace: Pace, stop: Halt = never
) -> Tally:
    """Go through the training or validation set once, or through what is left of it at `place`.

    Every sample must be counted once, or have been skipped. Raises Stopped if `stop()` says so first, or where the
    workers fail.
    """
    tally, done, epoch = (place.tally or Tally()).go_on(), place.batch, place.epoch
    wanted, part = (plan.n_train, "training") if train else (plan.n_valid, "validation")
    due = tally.seen + max(0, wanted - done * plan.batch_size)  # images may be others than before a pause
    try:
        for reports in gang.stream(plan.chunks(train, epoch, pace, done, stop)):
            tally.add(reports)
            done += len(reports[0].chunk.hypers)
            pace.learn(reports)
            tracker.chunk(reports)
            if train and not plan.skips_nan:
                refuse_nan(reports)
            elif train and (steps := spoiled_steps(reports)):
                told = ", ".join(map(str, steps))
                tracker.fault(f"skipped: step{'s' * (len(steps) > 1)} {told}, of a loss or gradient that is not finite")
        if len(tally.bad_images) == wanted:
            raise UserError(f"no image of the {part} set could be read; see bad_images.csv")
        if train and done == plan.train_batches and tally.spoiled and not tally.count:
            raise AllSkipped(f"all steps of epoch {epoch} had to be skipped, since none was finite; {ADVICE}")
    except UserError as failed:
        raise Stopped(Place(epoch, done, tally), failed) from failed
    if done < (plan.train_batches if train else plan.valid_batches):
        raise Stopped(Place(epoch, done, tally))
    if tally.seen != due:
        raise UserError(f"epoch {epoch} counted {tally.seen} samples instead of {due}: this is a bug, please report it")
    if not train and not math.isfinite(loss := tally.totals["loss"]):
        tracker.fault(f"the validation of epoch {epoch} came to a loss of {loss}, no finite number; training goes on")
    return tally


def refuse_nan(reports: Sequence[Report]) -> None:
    "Stop a run whose loss is no longer a number: all later steps would be lost."
    chunk = reports[0].chunk
    for step in spoiled_steps(reports):
        loss, rate = reports[0].losses[step - chunk.step], chunk.hypers[step - chunk.step]["lr"]
        raise Spoiled(f"the loss became {loss} at step {step} (learning rate {rate:g})", step)


class Due:
    "Whether a checkpoint is due: the last is old enough for what it cost, and there is something new to save."

    def __init__(self) -> None:
        self.saved()

    def saved(self, pause: float = 0.0) -> None:
        "There is one just now, for which training has paused for so many seconds."
        self.last, self.asked = time.monotonic(), False
        self.wait = SAVE_EVERY * max(1.0, pause / CHEAP)

    def __call__(self) -> bool:
        "Asked before each chunk."
        asked, self.asked = self.asked, True
        return asked and time.monotonic() - self.last >= self.wait


def learn(
    plan: Plan, gang: Gang, tracker: Tracker, place: Place, pace: Pace, stop: Halt, due: Due, on_pause: OnPause
) -> Tally:
    "The training pass from `place` on; whenever a checkpoint is `due`, it pauses, and `on_pause` is told where."
    while True:
        try:
            return one_pass(plan, gang, tracker, True, place, pace, lambda: stop() or due())
        except Stopped as paused:
            if paused.cause is not None or stop():
                raise
            place, began = paused.place, time.monotonic()
        with standing_at(place):
            on_pause(place)
        due.saved(time.monotonic() - began)


def train(
    plan: Plan,
    gang: Gang,
    tracker: Tracker,
    on_epoch: OnEpoch = lambda row: True,
    place: Place | None = None,
    stop: Halt = never,
    on_pause: OnPause = lambda place: None,
) -> None:
    """Train and validate from `place` to the last epoch, or until `on_epoch` of an epoch's row says False.

    Both that and `on_pause` are to save where the run stands: after each epoch, and whenever it is `Due`. Raises
    Stopped with the place reached if `stop()` says so first, or where the workers fail.
    """
    place, due = place or Place(), Due()
    each = plan.train_batches + plan.valid_batches
    tracker.start(plan.epochs * each, place.epoch * each + place.batch)
    paces = {True: Pace(), False: Pace()}
    for epoch in range(place.epoch, plan.epochs):
        here = place if epoch == place.epoch else Place(epoch)
        with standing_at(here):
            gang.grow()
        learned = learn(plan, gang, tracker, here, paces[True], stop, due, on_pause)
        with standing_at(Place(epoch, plan.train_batches, learned)):
            if gang.world_size > 1:
                fingerprint(gang, f"after epoch {epoch}")
            measured = one_pass(plan, gang, tracker, False, Place(epoch), paces[False], stop)
        step = (epoch + 1) * plan.train_batches - 1
        row = tracker.epoch(epoch, step, plan.hypers(step)["lr"], learned, measured)
        with standing_at(Place(epoch + 1)):
            go_on = on_epoch(row)
        due.saved()
        if not go_on:
            break
