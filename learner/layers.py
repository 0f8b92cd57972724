"The layers that models are built of, and how their weights start."

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.batchnorm import BatchNorm
from learner.errors import UsageError
from learner.module import Module, Parameter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "mish": F.mish}


def _fans(weight: Tensor) -> tuple[int, int]:
    "How many inputs feed one output, and how many outputs one input feeds, for (out, in, ...) weights."
    receptive = math.prod(weight.shape[2:])
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def _drawn(weight: Tensor, std: float) -> Tensor:
    "Normal numbers; none on the device meta, for which torch would load its compiler: a second, and a folder in /tmp."
    return weight if weight.is_meta else weight.normal_(std=std)


def kaiming_normal(*shape: int) -> Tensor:
    "Weights (out, in, ...) that keep the variance through a ReLU: He et al., 2015 (https://arxiv.org/abs/1502.01852)."
    weight = torch.empty(*shape)
    return _drawn(weight, math.sqrt(2 / _fans(weight)[0]))


def kaiming_normal_out(*shape: int) -> Tensor:
    "As `kaiming_normal`, but keeping the variance of gradients on their way back: what torchvision's ResNets use."
    weight = torch.empty(*shape)
    return _drawn(weight, math.sqrt(2 / _fans(weight)[1]))


def xavier_normal(*shape: int) -> Tensor:
    "Weights (out, in, ...) that keep the variance without an activation, forth and back: Glorot and Bengio, 2010."
    weight = torch.empty(*shape)
    return _drawn(weight, math.sqrt(2 / sum(_fans(weight))))


def known_activation(name: str) -> str:
    "`name`, if it is one of ACTIVATIONS; else UsageError."
    if name not in ACTIVATIONS:
        raise UsageError(f"activation {name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return name


def activated(x: Tensor, name: str) -> Tensor:
    "The activation of that name of `x`, which it may overwrite: for what was just computed and is needed no more."
    return F.relu(x, inplace=True) if name == "relu" else ACTIVATIONS[name](x)


class Activation(Module):
    """A nonlinearity by name, the same at each number; any shape.

    `relu`, `silu` (https://arxiv.org/abs/1702.03118) or `mish` (https://arxiv.org/abs/1908.08681).
    """

    def __init__(self, name: str = "relu") -> None:
        self.name = known_activation(name)

    def forward(self, x: Tensor) -> Tensor:
        "Same shape and dtype as `x`, which is left as it is."
        return ACTIVATIONS[self.name](x)


class Conv(Module):
    """A convolution alone: (n, n_in, h, w) float -> (n, n_out, ceil(h/stride), ceil(w/stride)) for odd `ks`.

    `start(n_out, n_in, ks, ks)` gives the first weights; the bias starts at zero. Weights are channels_last in memory,
    as the pictures are: a CPU's ResNet step takes 0.85 of the time, and no kernel has to turn them around.
    """

    def __init__(
        self, n_in: int, n_out: int, ks: int = 3, stride: int = 1, bias: bool = False,
        start: Callable[..., Tensor] = kaiming_normal_out,
    ) -> None:  # fmt: skip
        self.stride, self.padding = stride, ks // 2
        self.weight = Parameter(start(n_out, n_in, ks, ks).contiguous(memory_format=torch.channels_last))
        self.bias = Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        "Convolve."
        # of a single pixel any stride makes the same, but with 2 torch's bf16 leaves garbage in the weights' gradient
        stride = 1 if x.shape[2:] == (1, 1) else self.stride
        return F.conv2d(x, self.weight, self.bias, stride, self.padding)


class ConvLayer(Conv):
    """A convolution that halves the picture at `stride=2`, then BatchNorm if `norm`, then an activation if `act`.

    (n, n_in, h, w) float -> (n, n_out, ceil(h/stride), ceil(w/stride)) for an odd kernel size `ks`. `act` is True for
    a ReLU, or a name of ACTIVATIONS. The weights start by Kaiming's rule where an activation follows and by Xavier's
    where none does; the bias, left out before a BatchNorm, starts at zero.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int = 1, ks: int = 3, act: bool | str = True, norm: bool = False
    ) -> None:
        super().__init__(n_in, n_out, ks, stride, bias=not norm, start=kaiming_normal if act else xavier_normal)
        self.act = known_activation(act) if isinstance(act, str) else act
        self.norm = BatchNorm(n_out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        "Convolve, normalise, activate."
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.act:
            x = activated(x, "relu" if self.act is True else str(self.act))
        return x


class Linear(Module):
    "A matrix product and a bias: (..., n_in) float -> (..., n_out)."

    def __init__(self, n_in: int, n_out: int) -> None:
        self.weight, self.bias = Parameter(xavier_normal(n_out, n_in)), Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        "x @ weight.T + bias."
        return F.linear(x, self.weight, self.bias)


class AdaptivePool(Module):
    """The mean of each channel over each cell of a `size` x `size` grid, whatever the picture's size, as one row.

    (n, c, h, w) -> (n, c * size * size): with the default, the mean over the picture. A picture that has fewer pixels
    than the grid repeats them; one that has as many is only flattened.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        "Average, and flatten."
        return F.adaptive_avg_pool2d(x, self.size).flatten(1)


class MaxPool(Module):
    "The largest number around each pixel, or around every second: (n, c, h, w) -> (n, c, ceil(h/stride), ...)."

    def __init__(self, ks: int = 3, stride: int = 2) -> None:
        self.ks, self.stride = ks, stride

    def forward(self, x: Tensor) -> Tensor:
        "Channel by channel; what lies outside the picture never wins."
        return F.max_pool2d(x, self.ks, self.stride, self.ks // 2)


class AvgPool(Module):
    "The mean of each 2x2 square: (n, c, h, w) -> (n, c, ceil(h/2), ceil(w/2)); an odd edge averages what there is."

    def forward(self, x: Tensor) -> Tensor:
        "Channel by channel."
        return F.avg_pool2d(x, 2, ceil_mode=True)


class BlurPool(Module):
    """Every second pixel of the picture blurred by [1 2 1]/4 both ways, its edge repeated outwards.

    (n, c, h, w) -> (n, c, ceil(h/2), ceil(w/2)). Zhang, 2019 (https://arxiv.org/abs/1904.11486). The filter is the
    mean of neighbours, twice; the first mean, over only what lies inside, is what repeats the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        "Channel by channel."
        return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False), 2)


class Flatten(Module):
    "All dimensions behind the first as one: (n, ...) -> (n, product)."

    def forward(self, x: Tensor) -> Tensor:
        "Flatten."
        return x.flatten(1)


class Lambda(Module):
    "Any function as a layer."

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def forward(self, *args: Any) -> Any:
        "Call it."
        return self.function(*args)
