"Gradients in one contiguous buffer, summed over all ranks inside the optimizer's step."

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.comms import Comm
from learner.module import Parameter


class GradientSum:
    """The `reduce` of an optimizer: turns each rank's summed gradients into the mean over the global batch.

    Gradients are views of one flat buffer, so that a single all-reduce moves them and nothing is copied. The buffer's
    end has two things more that are summed over all ranks in the same message. `weight` is what the samples count for,
    one each or by their classes, and what the gradients are divided by: ranks may differ in how many they have, none
    included. `tail` has `extra` numbers for whoever needs them. To both is added before a step.
    """

    def __init__(self, params: Sequence[Parameter], comm: Comm, extra: int = 0) -> None:
        self.comm = comm
        total = sum(p.numel() for p in params)
        self.flat = torch.zeros(total + 1 + extra, dtype=params[0].dtype, device=params[0].device)
        self.gradients, self.weight, self.tail = self.flat.split([total, 1, extra])
        for p, grad in zip(params, self.gradients.split([p.numel() for p in params])):
            p.grad = grad.view_as(p)
        self.views: list[Tensor] = [p.grad for p in params if p.grad is not None]

    def __call__(self, params: Sequence[Parameter]) -> None:
        "Sum gradients, weight and tail over all ranks, and divide the gradients by the weight."
        if any(p.grad is not view for p, view in zip(params, self.views, strict=True)):
            raise RuntimeError("a gradient was replaced, not filled: clear gradients with optimizer.zero_grad()")
        self.comm.sum_(self.flat)
        self.gradients /= torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))

    def take_tail(self) -> Tensor:
        "A copy of the tail; it and the weight begin anew."
        taken = self.tail.clone()
        self.tail.zero_()
        self.weight.zero_()
        return taken

    def reset(self) -> None:
        "Forget what was gathered for a step that did not come to its end."
        self.flat.zero_()
