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
    last element carries the number of samples, or their weight: the true global one arrives in the same message, and
    ranks may differ in how many they have, none included.
    """

    def __init__(self, params: Sequence[Parameter], comm: Comm) -> None:
        self.comm = comm
        total = sum(p.numel() for p in params)
        self.flat = torch.zeros(total + 1, dtype=params[0].dtype, device=params[0].device)
        for p, grad in zip(params, self.flat[:-1].split([p.numel() for p in params])):
            p.grad = grad.view_as(p)
        self.views: list[Tensor] = [p.grad for p in params if p.grad is not None]
        self.n_local = 0.0

    def __call__(self, params: Sequence[Parameter]) -> None:
        "Sum gradients and counts over all ranks and divide; set `n_local`, the count or the samples' weight, before."
        if any(p.grad is not view for p, view in zip(params, self.views, strict=True)):
            raise RuntimeError("a gradient was replaced, not filled: clear gradients with optimizer.zero_grad()")
        self.flat[-1] = self.n_local
        self.comm.sum_(self.flat)
        total = self.flat[-1]
        self.flat[:-1] /= torch.where(total > 0, total, torch.ones_like(total))
