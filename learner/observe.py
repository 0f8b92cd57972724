"observed: a model that is only looked at, by hooks, and left as it was."

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from learner.module import Module


@contextmanager
def observed(model: Module, hooks: Iterable[tuple[Module, Callable[[Module, tuple, Any], Any]]]) -> Iterator[None]:
    """Within it, no gradients are recorded, `model` evaluates, and the modules have their forward hooks.

    Afterwards the hooks are gone, and each module trains or evaluates as it did before.
    """
    modes = [(module, module.training) for module in model.modules()]
    attached = [module.register_forward_hook(function) for module, function in hooks]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in attached:
            hook.remove()
        for module, training in modes:  # parents come first, so each module ends with its own mode
            module.training = training
