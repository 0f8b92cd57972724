"A model that is only looked at: model_summary, what each layer gives, holds and costs, as data and as a table."

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.layers import Conv, Linear
from learner.module import Module, Parameter, Sequential


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


@dataclass
class LayerRow:
    """One layer: its dotted name and class, the shape of one sample's output (None: never called), its own parameters.

    `flops` counts the multiply-adds of convolutions and matrix products for one sample.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    parameters: int = 0
    trainable: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Summary:
    "A row for each layer, in the order of the model; `str` of it is a table."

    rows: list[LayerRow]

    @property
    def parameters(self) -> int:
        "Numbers in all parameters."
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        "Those of them that are not frozen."
        return sum(row.trainable for row in self.rows)

    @property
    def flops(self) -> int:
        "Multiply-adds for one sample."
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        lines = [("layer", "kind", "output", "parameters", "trainable", "multiply-adds")]
        for row in self.rows:
            shape = "not called" if row.shape is None else " x ".join(map(str, row.shape))
            lines.append((row.name, row.kind, shape, *_numbers(row)))
        lines.append(("total", "", "", *_numbers(self)))
        widths = [max(map(len, column)) for column in zip(*lines)]
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        table = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        return "\n".join([table[0], rule, *table[1:-1], rule, table[-1]])


def _numbers(counts: LayerRow | Summary) -> tuple[str, str, str]:
    return f"{counts.parameters:,}", f"{counts.trainable:,}", f"{counts.flops:,}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]


def model_summary(model: Module, input_shape: Sequence[int]) -> Summary:
    """Run `model` on one sample of `input_shape` (channels, h, w), in evaluation mode, and describe its layers.

    A layer is a module that has parameters or buffers of its own, or no modules below. Parameters that several layers
    share count in the first; multiply-adds count at each use.
    """
    seen: set[Tensor] = set()
    layers = {
        module: LayerRow(name, type(module).__name__) for name, module in model.named_modules() if _is_layer(module)
    }
    for module, row in layers.items():
        fresh = [p for p in _own(module) if p not in seen and isinstance(p, Parameter)]
        seen.update(fresh)
        row.parameters = sum(p.numel() for p in fresh)
        row.trainable = sum(p.numel() for p in fresh if p.requires_grad)

    def note(module: Module, inputs: tuple, output: Tensor) -> None:
        row = layers[module]
        row.shape = tuple(output.shape[1:])
        if isinstance(module, Conv | Linear):
            row.flops += output.numel() * math.prod(module.weight.shape[1:])

    with observed(model, [(module, note) for module in layers]):
        model(_zeros_like_input(model, input_shape))
    return Summary(list(layers.values()))


def _own(module: Module) -> list[Tensor]:
    "The parameters and buffers of the module itself."
    return [t for name, t in (*module.named_parameters(), *module.named_buffers()) if "." not in name]


def _is_layer(module: Module) -> bool:
    return bool(_own(module)) or not (module.children or isinstance(module, Sequential))


def _zeros_like_input(model: Module, shape: Sequence[int]) -> Tensor:
    first = next(iter(model.parameters()), torch.empty(0))
    return torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
