"Mix: MixUp and CutMix on each training batch, once it is on the device and augmented."

from __future__ import annotations

import torch
from torch import Tensor

from learner.data.mix import MixConfig, blend, mix_images, mix_targets, pairs
from learner.dropout import dropouts, set_keys
from learner.errors import UserError
from learner.learner import Callback
from learner.memory import send


class Mix(Callback):
    """Replace a training batch by its mixture: targets become soft, (n, n_classes) float32.

    The batch is the whole global batch, unless `place` tells which rows `mine` are out of how many; then the batch has
    the rows `needed` for them (the learner's `rows` say which could be loaded), of which only mine are left. UserError
    where a batch is a part of another, as with Accumulate, which this can't mix.
    """

    order = -5  # after SetupLearner, so that a partner is the picture that it is in its own row

    def __init__(self, config: MixConfig, n_classes: int, seed: int) -> None:
        self.config, self.n_classes, self.seed = config, n_classes, seed
        self.place: tuple[range, int] | None = None

    def before_batch(self) -> None:
        "Mix inputs and targets; `rows` become those of the own samples."
        if not self.model.training:
            return
        x, y = self.batch
        if self.rows is not None and self.place is None:
            raise UserError("a part of a batch can't be mixed: leave Accumulate out, or Mix")
        rows = torch.arange(len(y)) if self.rows is None else self.rows
        mine, n = self.place or (range(len(y)), len(y))
        own, other = pairs(rows, mine, n)
        drawn = blend(self.seed, self.global_step, n, self.config)[rows[own]]
        own_there, other_there = send(own, y.device), send(other, y.device)
        images = mix_images(x[own_there], x[other_there], drawn)
        soft = mix_targets(y[own_there], y[other_there], drawn, x.shape[-1], self.n_classes)
        self.learner.batch, self.learner.rows = (images, soft), rows[own]
        self._keep_keys(own_there)

    def cleanup_batch(self) -> None:
        "A batch by itself is the whole one."
        self.learner.rows = None

    def _keep_keys(self, own: Tensor) -> None:
        "Leave Dropout the keys of the samples that are left."
        layers = dropouts(self.model)
        if layers and layers[0].keys is not None:
            set_keys(layers, layers[0].keys[own])
