"SetupLearner: the model and each batch onto the device, bytes into what the model sees."

from __future__ import annotations

from collections.abc import Callable

import torch

from learner.data.augment import Augment
from learner.data.normalize import Normalize
from learner.data.warp import Warp
from learner.dropout import Dropout, dropouts, sample_keys, set_keys
from learner.errors import UserError
from learner.learner import Callback
from learner.memory import send


class SetupLearner(Callback):
    """Prepare each batch: to `device`, augmented, normalised, and from NHWC to NCHW.

    Batches arrive as uint8 (n, h, w, channels); the model gets float32 (n, channels, size, size). Without `device`
    this is the GPU if there is one; without `normalize`, that is what the loaders' `prepare` makes of the first
    training batch (a DataBlock's batch transforms), or Normalize with that batch's statistics: UserError if another
    comes before. The masks of Dropout come from `seed`, the step and the samples' rows.
    """

    order = -10

    def __init__(
        self,
        device: torch.device | str | None = None,
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        augment: Augment | Warp | None = None,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.normalize, self.augment, self.seed = normalize, augment, seed
        self.dropouts: list[Dropout] = []

    def before_fit(self) -> None:
        "Move the model."
        self.model.to(self.device)
        self.dropouts = dropouts(self.model)

    def before_batch(self) -> None:
        "Move, augment and normalise the inputs; move the targets; decide what will be dropped."
        xb, yb = self.batch
        xb = send(xb, self.device)
        if self.augment is not None:
            xb = self.augment(xb, self.model.training, self.global_step, self.rows)
        if self.normalize is None:
            if not self.model.training:
                raise UserError("nothing is known to normalise by, before a training batch: fit, or give `normalize`")
            self.normalize = (getattr(self.dls, "prepare", None) or Normalize.of)(xb)
        self.learner.batch = self.normalize(xb), send(yb, self.device)
        if self.model.training and any(layer.p for layer in self.dropouts):
            rows = torch.arange(len(xb)) if self.rows is None else self.rows
            set_keys(self.dropouts, send(sample_keys(self.seed, self.global_step, rows), self.device))

    def cleanup_batch(self) -> None:
        "Let calls outside of batches drop at random."
        set_keys(self.dropouts, None)
