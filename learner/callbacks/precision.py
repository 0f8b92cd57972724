"MixedPrecision: forward and backward in 16 bits where that is safe, weights and updates in 32."

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.errors import UsageError
from learner.learner import Callback
from learner.optimizer import SkipStep

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def first_scale(samples: int) -> float:
    "Where fp16's scale begins if the loss is the sum over so many: a power of 2, so that scaling rounds nothing."
    return 2.0 ** (16 - (samples - 1).bit_length())


class MixedPrecision(Callback):
    """Run the model under autocast in `precision`, bf16 or fp16: Micikevicius et al., https://arxiv.org/abs/1710.03740.

    Small gradients would vanish in fp16, so there the loss is scaled up before backward and the reduced gradients down
    again. If these are not finite, the step is skipped and the scale halved; after `patience` good steps it doubles.
    Reduced gradients are the same on all devices, and so is this decision. The first scale is right for a loss that is
    a mean; for one that is the sum over a batch, pass `first_scale(its samples)`.
    """

    order = 10

    def __init__(self, precision: str = "bf16", patience: int = 2000, scale: float = 2.0**16) -> None:
        if precision not in DTYPES:
            raise UsageError(f"precision {precision!r} is unknown; known are fp32, {', '.join(DTYPES)}")
        self.dtype, self.patience = DTYPES[precision], patience
        self.scale, self.good_steps = (scale if precision == "fp16" else 1.0), 0
        self.context: torch.autocast | None = None

    def after_opt(self) -> None:
        "Have the optimizer unscale what it has reduced."
        if self.dtype is torch.float16:
            self.opt.then(self.unscale)

    def before_batch(self) -> None:
        "Enter autocast; gradients are to be scaled."
        self.learner.loss_scale = self.scale
        self.context = torch.autocast(self.batch[0].device.type, self.dtype)
        self.context.__enter__()

    def after_predict(self) -> None:
        "Leave autocast: the loss is computed in 32 bits."
        self._leave()
        self.learner.preds = self.preds.float()

    def cleanup_batch(self) -> None:
        "Leave autocast if the batch was cancelled within it."
        self._leave()

    def cleanup_fit(self) -> None:
        "What trains without this callback has no scale."
        self.learner.loss_scale = 1.0

    def _leave(self) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None

    def unscale(self, params: object) -> None:
        "Divide gradients by the scale, and adapt it; raises SkipStep if they are not finite."
        grads = self.opt.grads
        finite = bool(torch.stack([grad.isfinite().all() for grad in grads]).all())  # the one wait for a GPU
        for grad in grads:
            grad.div_(self.scale)
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite or self.good_steps == self.patience:
            self.scale, self.good_steps = (self.scale * 2 if finite else self.scale / 2), 0
        if not finite:
            raise SkipStep

    def state_dict(self) -> dict[str, Tensor]:
        "The scale and the count of good steps."
        return {"scale": torch.tensor([self.scale, self.good_steps], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        "Take over what `state_dict` gave."
        self.scale, self.good_steps = float(state["scale"][0]), int(state["scale"][1])
