"""LSUV: weights that give each layer's output the variance 1 on a batch of the data.

Mishkin and Matas, 2016 (https://arxiv.org/abs/1511.06422): orthonormal weights, then layer by layer, from the input
on, divided by the standard deviation of what the layer gives before its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learner.errors import UserError
from learner.layers import Conv, Linear
from learner.module import Module
from learner.summary import observed
from learner.xresnet import SqueezeExcitation


def orthonormal(weight: Tensor) -> Tensor:
    "Random weights of the shape of `weight` (out, ...) whose rows (or columns, where those are fewer) are orthonormal."
    flat = torch.randn(weight.shape[0], weight[0].numel(), dtype=torch.float64)
    q, r = torch.linalg.qr(flat.T if flat.shape[0] < flat.shape[1] else flat)
    q = q * r.diagonal().sign()  # without the signs the draw would favour some rotations
    return (q.T if flat.shape[0] < flat.shape[1] else q).reshape(weight.shape).to(weight)


def lsuv(model: Module, x: Tensor, tolerance: float = 0.01, tries: int = 10) -> dict[str, float]:
    """Initialise each convolution and linear layer of `model` on the batch `x`, as the model takes it.

    One forward pass in evaluation mode, so that nothing is dropped and no statistics move: each layer is done when its
    input arrives, and then passes on what it gives. A layer is rescaled until its variance is within `tolerance` of 1,
    `tries` times at most. Gives each layer's variance by name. UserError where a layer gives a constant. Left as they
    are: the gates of SqueezeExcitation, which see but zeros until the BatchNorm before them has learnt something.
    """
    if not len(x):
        raise UserError("LSUV measures the layers on a batch, and this one is empty: give it some samples")
    variances: dict[str, float] = {}

    def settler(name: str) -> Callable[[Module, tuple, Tensor], Tensor | None]:
        def settle(module: Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if name in variances:
                return None  # a layer that is used twice was done at its first use
            variances[name] = _settle(module, name, inputs[0], tolerance, tries)
            return module.forward(*inputs)

        return settle

    gates = {layer for block in model.modules() if isinstance(block, SqueezeExcitation) for layer in block.modules()}
    named = [(name, module) for name, module in model.named_modules() if module not in gates]
    layers = [(name, module) for name, module in named if isinstance(module, Conv | Linear)]
    with observed(model, [(module, settler(name)) for name, module in layers]):
        model(x)
    return variances


def _settle(layer: Any, name: str, x: Tensor, tolerance: float, tries: int) -> float:
    layer.weight.copy_(orthonormal(layer.weight))
    for _ in range(tries):
        variance = _variance(layer, x)
        if abs(variance - 1) <= tolerance:
            break
        if not 1e-12 < variance < float("inf"):
            raise UserError(f"LSUV: layer {name} has variance {variance} on this batch, which no scale makes 1")
        layer.weight.div_(variance**0.5)
    return _variance(layer, x)


def _variance(layer: Conv | Linear, x: Tensor) -> float:
    "Of all that the convolution or product gives, before BatchNorm and activation."
    before = Conv.forward(layer, x) if isinstance(layer, Conv) else layer.forward(x)
    return before.double().var(correction=0).item()
