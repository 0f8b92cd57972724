"LRFinder and lr_find: the learning-rate range test of one process."

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from learner.callbacks.activations import ActivationStats
from learner.callbacks.progress import Progress
from learner.callbacks.track import TrackResults
from learner.errors import UserError
from learner.learner import Callback, CancelEpochException, CancelFitException, Learner
from learner.lr_range import RangeTest, suggest
from learner.optimizer import settable


class LRFinder(Callback):
    """Raise the rate step by step, and stop the fit once the loss diverges or all rates are tried; validate nothing.

    Afterwards `lrs` and `losses` hold the curve, `suggestions` a rate by each rule of lr_range (None if the loss never
    fell) and `suggestion` that of `minimum`; and the model and the callbacks' state are as before. A fit of too few
    steps tries but the lower rates: `lr_find` runs one of enough. A loss is that of a step: where several batches make
    one (Accumulate), the mean over the samples of all.
    """

    order = 10

    def __init__(self, start: float = 1e-6, end: float = 10.0, n_steps: int = RangeTest.steps) -> None:
        self.range = start, end, n_steps
        self.test = RangeTest(*self.range)

    def before_fit(self) -> None:
        "Plan the rates."
        self.test = RangeTest(*self.range)
        self.total, self.samples = 0.0, 0

    def after_opt(self) -> None:
        "Keep the state that training changes, now that all callbacks have theirs; UserError for a torch optimizer."
        settable(self.opt)
        self.saved = [_copy(part.state_dict()) for part in self._parts()]
        self.shuffled = getattr(self.dls.train, "epoch", None)

    def before_epoch(self) -> None:
        "Leave out validations."
        if not self.model.training:
            raise CancelEpochException

    def before_batch(self) -> None:
        "Set the rate to try."
        self.opt.lr = self.test.planned[len(self.test.losses)]

    def after_backward(self) -> None:
        "Before a step, note the mean loss of its samples; raises CancelFitException once enough is known."
        self.total, self.samples = self.total + float(self.learner.loss_total()), self.samples + len(self.batch[1])
        if self.last_part:
            self.test.add(self.total / self.samples)
            self.total, self.samples = 0.0, 0
            if self.test.finished:
                raise CancelFitException

    def cleanup_fit(self) -> None:
        "Put all back, and suggest; nothing if the fit ended before it began."
        saved = vars(self).pop("saved", None)
        if saved is None:
            return
        for part, state in zip(self._parts(), saved):
            part.load_state_dict(state)
        for p in self.model.parameters():
            p.grad = None
        if self.shuffled is not None:
            self.dls.train.epoch = self.shuffled
        self.lrs, self.losses, self.suggestions = self.test.lrs, self.test.losses, suggest(self.test)
        self.suggestion = self.suggestions["minimum"]

    def _parts(self) -> list:
        "The model, and callbacks that keep state."
        return [self.model, *(cb for cb in self.cbs if cb.state_dict())]


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def lr_find(learn: Learner, start: float = 1e-6, end: float = 10.0, n_steps: int = RangeTest.steps) -> LRFinder:
    """Test rates from `start` to `end` on `learn`, over as many epochs as `n_steps` steps take; see LRFinder.

    Without table, bars and records, but callbacks of one's own hear of the steps. Afterwards the learner is as it was
    before, and trains as if nothing had been. UserError if a callback ends the test before enough is known.
    """
    finder, quiet = LRFinder(start, end, n_steps), (ActivationStats, Progress, TrackResults)
    kept = [(cb, _copy(state)) for cb in learn.cbs if (state := cb.state_dict())]  # a fit begins an average anew
    counts = learn.n_epochs, learn.global_step
    try:
        with learn.added(finder):
            learn.cbs = [cb for cb in learn.cbs if not isinstance(cb, quiet)]
            learn.fit(n_steps)  # an epoch is a step or more, and the finder ends the fit
    finally:
        learn.n_epochs, learn.global_step = counts
        for cb, state in kept:
            cb.load_state_dict(state)
    if not finder.test.finished:
        raise UserError(
            f"a callback ended the test of rates after {len(finder.test.losses)} of {n_steps} steps: drop it"
        )
    return finder
