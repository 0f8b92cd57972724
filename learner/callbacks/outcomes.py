"KeepOutcomes: what the model made of each sample of a validation."

from __future__ import annotations

import torch

from learner.interpret import Outcomes
from learner.learner import Callback
from learner.memory import send


class KeepOutcomes(Callback):
    """Keep the Outcomes of the last validation, with the `k` likeliest classes of each sample, until they are taken.

    Each batch (of which this may see a part, as the learner's `rows` say) is of `batch_size` consecutive samples.
    """

    order = 40

    def __init__(self, batch_size: int, k: int = 5) -> None:
        self.batch_size, self.k = batch_size, k
        self.parts: list[Outcomes] = []

    def before_epoch(self) -> None:
        "Forget the validation before."
        if not self.model.training:
            self.parts = []

    def after_loss(self) -> None:
        "Note the batch: on the device, nobody waits for it."
        if self.model.training:
            return
        targets = self.batch[1]
        rows = torch.arange(len(targets)) if self.rows is None else self.rows
        samples = send(self.num * self.batch_size + rows, targets.device)
        self.parts.append(Outcomes.of(self.preds.detach(), targets, samples, self.k))

    def take(self) -> Outcomes | None:
        "All outcomes of this validation since the last call; None if there was no batch."
        parts, self.parts = self.parts, []
        return Outcomes.join(parts) if parts else None
