"ActivationStats: what comes out of each layer, step by step."

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.learner import Callback
from learner.module import Hook, Module

NEAR, LIMIT, BINS = 0.05, 10.0, 40
Choice = Callable[[str, Module], bool]


@dataclass(frozen=True)
class LayerStats:
    "Of one layer at each recorded step, float64: mean, std and fraction near zero (steps,), histogram (steps, bins)."

    mean: Tensor
    std: Tensor
    near_zero: Tensor
    histogram: Tensor


def child_of_root(name: str, module: Module) -> bool:
    "The layers that are looked at unless others are chosen: those directly below the model."
    return bool(name) and "." not in name


class ActivationStats(Callback):
    """Record mean, std, fraction near zero and histogram of the layers' outputs at every `every`th training step.

    `choose(dotted name, module)` says which layers. A number nearer to zero than `near` counts as near zero; the
    histogram has `bins` bins between -`limit` and `limit`, and the outermost also hold what lies beyond.
    `sums[name][step]` is a tensor (4 + bins,) float64: count, sum, sum of squares, count near zero, counts of the bins.
    The parts of a step, on one rank or several, simply add up. All stay on the device, and nobody waits for them; on
    a CPU, where a small net is slowed by half, `every` is there to be raised.
    """

    order = 5

    def __init__(
        self, choose: Choice = child_of_root, every: int = 1, near: float = NEAR, limit: float = LIMIT, bins: int = BINS
    ) -> None:
        self.choose, self.every, self.near, self.limit, self.bins = choose, every, near, limit, bins
        self.hooks: list[Hook] = []
        self.recording = False
        self.reset()

    def reset(self) -> None:
        "Forget the steps so far."
        self.sums: dict[str, dict[int, Tensor]] = {}

    def before_fit(self) -> None:
        "Attach a hook to each chosen layer."
        self.cleanup_fit()
        self.reset()
        chosen = [(name, module) for name, module in self.model.named_modules() if self.choose(name, module)]
        self.hooks = [module.register_forward_hook(self._recorder(name)) for name, module in chosen]

    def before_batch(self) -> None:
        "Decide whether this step is recorded."
        self.recording = self.model.training and self.global_step % self.every == 0

    def cleanup_batch(self) -> None:
        "Record nothing outside of batches."
        self.recording = False

    def cleanup_fit(self) -> None:
        "Detach the hooks; what was recorded stays."
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _recorder(self, name: str) -> Callable[[Module, tuple, Any], None]:
        def record(module: Module, inputs: tuple, output: Tensor) -> None:
            if self.recording:
                new, kept = self._sums(output.detach()), self.sums.setdefault(name, {})
                kept[self.global_step] = kept[self.global_step] + new if self.global_step in kept else new

        return record

    def _sums(self, x: Tensor) -> Tensor:
        return activation_sums(x, self.near, self.limit, self.bins)

    def take(self) -> dict[int, dict[str, np.ndarray]]:
        "The sums by step and layer, as name_Class, since the last call, on the CPU."
        modules, taken = dict(self.model.named_modules()), dict[int, dict[str, np.ndarray]]()
        for name, steps in self.sums.items():
            for step, sums in steps.items():
                taken.setdefault(step, {})[f"{name}_{type(modules[name]).__name__}"] = sums.cpu().numpy()
        self.reset()
        return taken

    def stats(self, name: str) -> LayerStats:
        "What was recorded of a layer, in the order of the steps."
        return layer_stats(torch.stack(list(self.sums[name].values())))


def activation_sums(x: Tensor, near: float, limit: float, bins: int) -> Tensor:
    "The sums of `ActivationStats` for numbers `x` of any shape: (4 + bins,) float64 on its device."
    x = x.double()
    close = (x.abs() < near).sum(dtype=torch.float64)
    counts = torch.histc(x.clamp(-limit, limit), bins, -limit, limit)
    return torch.cat([torch.stack([torch.full_like(close, x.numel()), x.sum(), x.square().sum(), close]), counts])


def layer_stats(sums: Tensor) -> LayerStats:
    "From sums (steps, 4 + bins), of one rank or added up over all, to the numbers that people look at."
    count, total, squares, close = sums[:, :4].unbind(1)
    mean = total / count
    return LayerStats(mean, (squares / count - mean.square()).clamp(min=0).sqrt(), close / count, sums[:, 4:])
