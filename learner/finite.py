"Finding where numbers stop being finite."

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from learner.batchnorm import BatchNorm
from learner.module import Module


@torch.no_grad()
def first_not_finite(model: Module, x: Tensor) -> str | None:
    """The name of the first layer that makes numbers out of a batch which are not finite; None if all are.

    The model sees the batch in the mode that it is in, so that BatchNorm's running statistics may change; those that
    are shared with other devices are of this batch alone.
    """
    found: list[str] = []
    shared = [module for module in model.modules() if isinstance(module, BatchNorm)]
    sums = [module.sum_ for module in shared]

    def look(name: str, module: Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and not module.children and not bool(output.isfinite().all()):
            found.append(name or "the model")

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    try:
        for module in shared:
            module.sum_ = None
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, sum_ in zip(shared, sums):
            module.sum_ = sum_
    return found[0] if found else None
