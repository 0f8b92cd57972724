"ClipGradients: a bound on the norm of all gradients together."

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.learner import Callback
from learner.module import Parameter
from learner.optimizer import settable


def clip_norm(params: Sequence[Parameter], bound: float) -> Tensor:
    "Scale all gradients in place so that their norm as one vector is at most `bound`; the norm before, a scalar."
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).norm()  # a few kernels on a GPU, not one for each
    torch._foreach_mul_(grads, (bound / (norm + 1e-6)).clamp(max=1.0))
    return norm


class ClipGradients(Callback):
    "Clips to `bound` what the optimizer is about to use: where gradients are reduced over devices, the global ones."

    order = 20

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def after_opt(self) -> None:
        "Have the optimizer call `clip_norm` between reducing and updating; UserError for one of torch's."
        settable(self.opt).then(lambda params: clip_norm(params, self.bound))
