"SetupLearner: the model and each batch onto the device, bytes into what the model sees."

from __future__ import annotations

import torch

from learner.data.augment import Augment
from learner.data.normalize import Normalize
from learner.learner import Callback


class SetupLearner(Callback):
    """Prepare each batch: to `device`, augmented, normalised, and from NHWC to NCHW.

    Batches arrive as uint8 (n, h, w, channels); the model gets float32 (n, channels, size, size). Without `device`
    this is the GPU if there is one; without `normalize`, statistics are taken from the first training batch.
    """

    order = -10

    def __init__(
        self,
        device: torch.device | str | None = None,
        normalize: Normalize | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.normalize, self.augment = normalize, augment

    def before_fit(self) -> None:
        "Move the model."
        self.model.to(self.device)

    def before_batch(self) -> None:
        "Move, augment and normalise the inputs; move the targets."
        xb, yb = self.batch
        xb = xb.to(self.device, non_blocking=True)
        if self.augment is not None:
            xb = self.augment(xb, self.model.training, self.global_step, self.rows)
        if self.normalize is None:
            self.normalize = Normalize.of(xb)
        self.learner.batch = self.normalize(xb), yb.to(self.device, non_blocking=True)
