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
    end is `tail`, `extra` numbers that are summed over all ranks in the same message; the first is the number of
    samples: ranks may differ in how many they have, none included. Whoever needs them adds to the tail before a step.
    """

    def __init__(self, params: Sequence[Parameter], comm: Comm, extra: int = 1) -> None:
        self.comm = comm
        total = sum(p.numel() for p in params)
        self.flat = torch.zeros(total + extra, dtype=params[0].dtype, device=params[0].device)
        self.gradients, self.tail = self.flat[:total], self.flat[total:]
        for p, grad in zip(params, self.gradients.split([p.numel() for p in params])):
            p.grad = grad.view_as(p)
        self.views: list[Tensor] = [p.grad for p in params if p.grad is not None]

    def __call__(self, params: Sequence[Parameter]) -> None:
        "Sum gradients and tail over all ranks, and divide the gradients by the number of samples."
        if any(p.grad is not view for p, view in zip(params, self.views, strict=True)):
            raise RuntimeError("a gradient was replaced, not filled: clear gradients with optimizer.zero_grad()")
        self.comm.sum_(self.flat)
        self.gradients /= self.tail[0].clamp(min=1)

    def take_tail(self) -> Tensor:
        "A copy of the tail, which begins anew."
        taken = self.tail.clone()
        self.tail.zero_()
        return taken

    def reset(self) -> None:
        "Forget what was gathered for a step that did not come to its end."
        self.flat.zero_()
