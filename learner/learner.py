"The training loop, written once as verbs, with events around them that callbacks react to."

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learner.errors import UserError
from learner.groups import Splitter, freeze_to, layer_groups, one_group
from learner.losses import cross_entropy
from learner.module import Module
from learner.optim import SGD, Optimizer
from learner.optimizer import Rate


class CancelBatchException(Exception):
    "Raised by a callback to leave the current batch, and its gradients; the epoch goes on."


class CancelEpochException(Exception):
    "Raised by a callback to leave the current epoch; the fit goes on."


class CancelFitException(Exception):
    "Raised by a callback to end the fit."


CANCELS = {"batch": CancelBatchException, "epoch": CancelEpochException, "fit": CancelFitException}
EVENTS = [f"{when}_{what}" for what in CANCELS for when in ("before", "after", "cleanup")]
EVENTS += ["after_opt", "after_predict", "after_loss", "after_backward", "after_step"]


class Callback:
    """Reacts to the events in `EVENTS` by methods of their names; lower `order` goes first.

    `before_x` comes before x, `after_x` if x was completed, `cleanup_x` in any case; `after_opt` when the fit's
    optimizer has been made. The learner's attributes are read as the callback's own (`self.model`) and set through
    `self.learner`. From `after_loss` to `after_backward` the loss of a part of a batch (of Accumulate's, or a worker's)
    is the sum over its samples: what is added to it there must be one too.
    """

    order = 0
    learner: Learner

    def __init_subclass__(cls) -> None:
        prefixes = ("before_", "after_", "cleanup_")
        if strays := [name for name in vars(cls) if name.startswith(prefixes) and name not in EVENTS]:
            raise TypeError(f"{cls.__name__} defines {strays}, which no event calls; events are {EVENTS}")

    def state_dict(self) -> dict[str, Tensor]:
        "The tensors that this callback changes as training goes on; most have none."
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        "Take over what `state_dict` gave."

    def __getattr__(self, name: str) -> Any:
        if name == "learner" or name in EVENTS:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.learner, name)


class Learner:
    """Fits `model` to `dls.train`, and measures it on `dls.valid` after each epoch.

    `dls` holds two iterables of batches (inputs, targets); `loss_func(preds, targets)` gives a scalar;
    `opt_func(parameters, lr=lr)` an optimizer, made anew by each `fit`; where `splitter` makes several groups of the
    model's layers, it is given those. While it runs, callbacks find in it `epoch`, `num` (of the batch in its epoch),
    `global_step` (optimizer steps done), `batch`, `preds`, `loss`, `opt` and `dl`. They may set `forward`, a faster way
    to what the model gives; `rows`, where the batch's samples stand in a larger one that it is a part of; `last_part`,
    False where a later batch takes the step for this one too; and `loss_scale`, which gradients are to be too large by.
    """

    batch: tuple[Tensor, Tensor]
    preds: Tensor
    loss: Tensor
    opt: Optimizer
    forward: Callable[[Tensor], Tensor] | None = None
    rows: Tensor | None = None
    last_part = True
    loss_scale = 1.0

    def __init__(
        self,
        model: Module,
        dls: Any,
        loss_func: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        lr: Rate = 0.1,
        cbs: Sequence[Callback] = (),
        opt_func: Callable[..., Optimizer] = SGD,
        splitter: Splitter = one_group,
    ) -> None:
        self.model, self.dls, self.loss_func, self.lr, self.opt_func = model, dls, loss_func, lr, opt_func
        self.splitter = splitter
        self.epoch = self.num = self.global_step = self.n_epochs = 0
        self.dl: Iterable[tuple[Tensor, Tensor]] = ()
        self.cbs: list[Callback] = []
        for cb in cbs:
            self.add_cb(cb)

    def add_cb(self, cb: Callback) -> None:
        "Attach a callback; UserError for a class of them."
        if isinstance(cb, type):
            raise UserError(f"{cb.__name__} is a class, and no callback by itself: give {cb.__name__}()")
        cb.learner = self
        self.cbs = sorted([*self.cbs, cb], key=lambda one: one.order)

    @contextmanager
    def added(self, cb: Callback) -> Iterator[None]:
        "Within it, `cb` is attached too."
        before = self.cbs
        self.add_cb(cb)
        try:
            yield
        finally:
            self.cbs = before

    def __call__(self, event: str) -> None:
        "Let the callbacks react to `event`, in their order."
        for cb in self.cbs:
            if hasattr(type(cb), event) or event in vars(cb):  # not the callback itself: it would ask the learner
                getattr(cb, event)()

    def phase(self, name: str, body: Callable[[], None]) -> None:
        "Run `body` between its events; an exception of the kind that cancels `name` ends it quietly."
        try:
            self(f"before_{name}")
            body()
            self(f"after_{name}")
        except CANCELS[name]:
            pass
        finally:
            self(f"cleanup_{name}")

    def freeze_to(self, n: int) -> None:
        "Train the splitter's layer groups from number `n` on (negative: from the end), and BatchNorm in all of them."
        freeze_to(self.model, layer_groups(self.model, self.splitter), n)

    def freeze(self) -> None:
        "Train the last layer group and BatchNorm alone; UserError if it is the only one."
        if len(layer_groups(self.model, self.splitter)) < 2:
            raise UserError("all layers are in one group, which freeze() would train: pass splitter=body_and_head")
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        "Train all layers."
        self.freeze_to(0)

    def fit(self, n_epochs: int) -> None:
        "Train for `n_epochs`, each followed by a validation."
        self.n_epochs, self.global_step = n_epochs, 0
        for cb in self.cbs:
            cb.learner = self  # another one may have been given it since
        self.phase("fit", self._all_epochs)

    def _all_epochs(self) -> None:
        groups = layer_groups(self.model, self.splitter)
        self.opt = self.opt_func(groups if len(groups) > 1 else groups[0], lr=self.lr)
        self.zero_grad()  # a fit that was interrupted may have left some
        self("after_opt")
        for self.epoch in range(self.n_epochs):
            self.one_epoch(True)
            if self.dls.valid is not None:
                self.one_epoch(False)

    def one_epoch(self, train: bool) -> None:
        "All batches of the training set, or of the validation set without training."
        self.model.training = train
        self.dl = self.dls.train if train else self.dls.valid
        self.phase("epoch", self._all_batches)

    def _all_batches(self) -> None:
        for self.num, self.batch in enumerate(self.dl):
            self.one_batch()

    def one_batch(self) -> None:
        "Predict and measure `batch`; if the model is training, take an optimizer step too."
        with torch.set_grad_enabled(self.model.training):
            self.phase("batch", self._predict_and_learn)

    def _predict_and_learn(self) -> None:
        self.predict()
        self("after_predict")
        self.get_loss()
        self("after_loss")
        if self.model.training:
            try:
                self._learn()
            except tuple(CANCELS.values()):
                if self.last_part:
                    self.zero_grad()  # else the next step would take them too
                raise

    def _learn(self) -> None:
        self.backward()
        self("after_backward")
        if self.last_part:
            self.step()
            self("after_step")
            self.zero_grad()

    def predict(self) -> None:
        "Inputs to `preds`."
        self.preds = (self.forward or self.model)(self.batch[0])

    def get_loss(self) -> None:
        "`preds` and targets to `loss`."
        self.loss = self.loss_func(self.preds, self.batch[1])

    def loss_total(self) -> Tensor:
        "The sum of the batch's losses, a scalar without a gradient."
        return self.loss.detach() * len(self.batch[1])

    def backward(self) -> None:
        "`loss` to gradients, both times `loss_scale` (1 but for fp16)."
        (self.loss if self.loss_scale == 1 else self.loss * self.loss_scale).backward()

    def step(self) -> None:
        "Gradients to new parameters."
        self.opt.step()
        self.global_step += 1

    def zero_grad(self) -> None:
        "Forget the gradients."
        self.opt.zero_grad()
