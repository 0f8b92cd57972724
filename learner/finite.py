"Finding where numbers stop being finite."

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learner.module import Module


@contextmanager
def spoiled_outputs(model: Module) -> Iterator[list[str]]:
    "Within it, the list has the names of the layers that made numbers which are not finite, as they came."
    found: list[str] = []

    def look(name: str, module: Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and not module.children and not bool(output.isfinite().all()):
            found.append(name or "the model")

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def spoiled_gradients(model: Module) -> list[str]:
    "The names of the layers whose gradients are not finite, from the model's end, where backward begins."
    grads = ((name.rpartition(".")[0], p.grad) for name, p in reversed(list(model.named_parameters())))
    return [name or "the model" for name, grad in grads if grad is not None and not bool(grad.isfinite().all())]
