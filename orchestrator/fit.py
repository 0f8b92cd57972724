"Fit: what `launch` does with a session: find the rate if asked, train, and save the last epoch or the best."

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from cluster.faults import not_finite
from cluster.not_finite import files_of, some
from learner.errors import UserError, printable
from orchestrator.driver import AllSkipped, Place, Replicas, Spoiled, Stopped, fingerprint, train
from orchestrator.range_test import suggestion
from orchestrator.resume import Standing, newest_checkpoint
from orchestrator.session import Session
from orchestrator.stop import Interrupted, Stop, too_late

GO_ON = "go on with the same command and --resume last"


def fit(session: Session) -> dict[str, Any]:
    """Train as the session's configuration says, from where it stands; the row of the epoch whose model was saved.

    Asked to stop, it saves where it stands and raises Interrupted, also where the workers went with that. So it does
    where they fail for good, and raises what they did.
    """
    config, standing = session.config, session.standing
    rate = standing.lr or (find_rate(session) if config.lr == "auto" else session.plan.lr)
    if standing.lr is None:
        session.show_samples()
    if standing.lr is None and config.on_nan == "rollback":
        session.save_checkpoint(Standing(lr=rate))  # the first that there is to go back to
    course = Course(session, rate)
    course.reserve()
    with Stop() as stop:
        session.gang.heed(stop)
        try:
            if not course.best.exhausted:
                plan = replace(session.plan, lr=rate)
                train(plan, session.gang, session.tracker, course.on_epoch, standing.place, stop, course.save)
        except Stopped as stopped:
            _keep(course, stopped, stop)
        row = course.end()
    too_late()
    return row


class Course:
    "What a run came to so far: the rows of its epochs, the best of them, and that one's model."

    def __init__(self, session: Session, rate: float) -> None:
        self.session, self.rate = session, rate
        self.rows = list(session.standing.rows)
        self.best = Best(session.config.early_stop)
        for row in self.rows:
            self.best.note(row)
        self.unsaved: dict[str, np.ndarray] | None = None  # the best model, until the disk takes it
        if session.config.save_best and self.rows:
            best = session.best_model()
            if not session.folder.has_model(best):
                self.unsaved = best  # the disk refused it, and may have that of an older best
                self.best.row = self.best.row if best else None

    def reserve(self) -> None:
        "Have room for the model on the disk, whatever fills it until then."
        self.session.tracker.record("what keeps room for the model", self.session.reserve_model)

    def standing(self, place: Place) -> Standing:
        "What there is to say of the run at that place, to go on from there."
        return Standing(place, tuple(self.rows), self.rate)

    def save(self, place: Place) -> None:
        "Save where the run stands in the midst of an epoch; raises Replicas where workers don't agree on that."
        if self.session.gang.world_size > 1:
            fingerprint(self.session.gang, f"in epoch {place.epoch}, after {place.batch} batches")
        self.session.save_checkpoint(self.standing(place))

    def on_epoch(self, row: dict[str, Any]) -> bool:
        "Save the model of the best epoch so far, and where the run stands; whether it is to go on."
        self.rows.append(row)
        if self.best.note(row) and self.session.config.save_best:
            self.unsaved = self.session.model()
        if self.unsaved and self.session.tracker.record("the model", self.session.save_model, self.unsaved):
            self.unsaved = None
            self.reserve()  # for the next best
        self.session.save_checkpoint(self.standing(Place(row["epoch"] + 1)))
        return not self.best.exhausted

    def end(self) -> dict[str, Any]:
        "Save the last model, or the best if that is still to be done; its row."
        row, tensors = self.best.row, self.unsaved
        if not self.session.config.save_best or row is None:
            row, tensors = self.rows[-1], self.session.model()
        try:
            if tensors:
                self.session.save_model(tensors)
        except OSError as error:
            error.add_note(_where_to_find(self))
            raise
        return row


def _keep(course: Course, stopped: Stopped, stop: Stop) -> NoReturn:
    "Save where a run stands that can't go on now, and say so; one that was asked to stop does so, whatever failed."
    cause, saved = stopped.cause, False
    if cause is None:
        try:
            course.save(stopped.place)
            saved = course.session.saver.finish()
        except UserError as failed:
            cause = failed
    if cause is not None:
        saved = _rescue(course, stopped.place, cause)
    if cause is None or stop():
        told = f"stopped in epoch {stopped.place.epoch}: {GO_ON if saved else _where_to_go_on(course.session)}"
        raise Interrupted(stop.code, told + (printable(f"\nmeanwhile, {cause}") if cause else "")) from None
    if saved:
        way = "--resume last goes on behind them" if not_finite(cause) else GO_ON
        cause.add_note(f"all completed steps are saved: {way}")
    if isinstance(cause, Spoiled):
        files = files_of(course.session.job, *divmod(cause.step, course.session.plan.train_batches))
        cause = Spoiled(cause.what, cause.step, some(files))
    raise cause


def _rescue(course: Course, place: Place, cause: UserError) -> bool:
    "Save what there is behind a failure; whether that is all completed steps."
    session = course.session
    if session.config.on_nan == "rollback" and not_finite(cause):
        _halve_rate(session)
    elif not isinstance(cause, Spoiled | AllSkipped | Replicas) and (tensors := session.gang.salvage()):
        session.save_checkpoint(course.standing(place), tensors)
        return session.saver.finish()
    return False


def _where_to_go_on(session: Session) -> str:
    "What is left of a run whose standing could not be saved."
    step = _newest_step(session)
    return "it could not be saved" + (f"; --resume last goes on at step {step}" if step is not None else "")


def _where_to_find(course: Course) -> str:
    "What is left of a model that could not be written."
    step, last = _newest_step(course.session), len(course.rows) * course.session.plan.train_batches
    if step is None:
        return "no checkpoint is there to go on from"
    does = "writes the model, and trains nothing again" if step == last else f"goes on at step {step} of {last}"
    return f"then the same command with --resume last {does}"


def _newest_step(session: Session) -> int | None:
    "The step of the newest checkpoint, once what was under way is written."
    session.saver.finish()
    checkpoint = newest_checkpoint(session.folder.path, begin_again=True)
    return checkpoint.step if checkpoint else None


def _halve_rate(session: Session) -> None:
    "Have the newest checkpoint, to which a run goes back whose numbers went wrong, say half the rate."
    session.saver.finish()
    if checkpoint := newest_checkpoint(session.folder.path, begin_again=True):
        standing = Standing.of_json(checkpoint.meta)
        session.save_checkpoint(replace(standing, lr=(standing.lr or 0.0) / 2), checkpoint.tensors)
        session.saver.finish()


def find_rate(session: Session) -> float:
    "The rate that the LR finder suggests; its curve goes into TensorBoard."
    test = session.range_test()
    rate = suggestion(test)
    print(f"LR finder: {len(test.losses)} steps, suggestion {rate:.3g}; training goes on at that rate\n", flush=True)
    session.show_range_test(test, rate)
    if phases := session.tracker.phases:
        phases.done("lr finder")
    return rate


class Best:
    "Which epoch was the best so far, by its accuracy; `patience` epochs without a new best end the run (0: none do)."

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.row: dict[str, Any] | None = None
        self.waited = 0

    def note(self, row: dict[str, Any]) -> bool:
        "Take an epoch's row; whether its accuracy is above all before it (the first always is)."
        if self.row is None or row["accuracy"] > self.row["accuracy"]:
            self.row, self.waited = row, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        "Whether patience has run out."
        return 0 < self.patience <= self.waited
