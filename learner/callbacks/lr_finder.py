"LRFinder: the learning-rate range test of one process."

from __future__ import annotations

from torch import Tensor

from learner.learner import Callback, CancelFitException
from learner.lr_range import RangeTest, minimum


class LRFinder(Callback):
    """Raise the rate step by step, and stop the fit once the loss diverges or all rates are tried.

    Afterwards `lrs` and `losses` hold the curve and `suggestion` a rate (None if the loss never fell), and the model
    is as it was before.
    """

    order = 10

    def __init__(self, start: float = 1e-6, end: float = 10.0, n_steps: int = 100) -> None:
        self.range = start, end, n_steps

    def before_fit(self) -> None:
        "Plan the rates and keep the model's state."
        self.test = RangeTest(*self.range)
        self.saved: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def before_batch(self) -> None:
        "Set the rate to try."
        if self.model.training:
            self.opt.lr = self.test.planned[len(self.test.losses)]

    def after_loss(self) -> None:
        "Note the loss at the rates so far; raises CancelFitException once enough is known."
        if self.model.training:
            self.test.add(self.loss.item())
            if self.test.finished:
                raise CancelFitException

    def cleanup_fit(self) -> None:
        "Put the model back, and suggest; nothing if the fit ended before this callback's `before_fit`."
        saved = vars(self).pop("saved", None)
        if saved is None:
            return
        self.model.load_state_dict(saved)
        for p in self.model.parameters():
            p.grad = None
        self.lrs, self.losses = self.test.lrs, self.test.losses
        self.suggestion = minimum(self.lrs, self.test.smoothed)
