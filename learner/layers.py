"The layers that models are built of, and how their weights start."

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.batchnorm import BatchNorm
from learner.module import Module, Parameter


def _fans(weight: Tensor) -> tuple[int, int]:
    "How many inputs feed one output, and how many outputs one input feeds, for (out, in, ...) weights."
    receptive = math.prod(weight.shape[2:])
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def kaiming_normal(*shape: int) -> Tensor:
    "Weights (out, in, ...) that keep the variance through a ReLU: He et al., 2015 (https://arxiv.org/abs/1502.01852)."
    weight = torch.empty(*shape)
    return weight.normal_(std=math.sqrt(2 / _fans(weight)[0]))


def xavier_normal(*shape: int) -> Tensor:
    "Weights (out, in, ...) that keep the variance without an activation, forth and back: Glorot and Bengio, 2010."
    weight = torch.empty(*shape)
    return weight.normal_(std=math.sqrt(2 / sum(_fans(weight))))


class ConvLayer(Module):
    """A convolution that halves the picture at `stride=2`, then BatchNorm if `norm`, then a ReLU if `act`.

    (n, n_in, h, w) float -> (n, n_out, ceil(h/stride), ceil(w/stride)) for an odd kernel size `ks`. The weights start
    by Kaiming's rule where an activation follows and by Xavier's where none does; the bias, left out before a
    BatchNorm, starts at zero.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1, ks: int = 3, act: bool = True, norm: bool = False):
        self.stride, self.padding, self.act = stride, ks // 2, act
        self.weight = Parameter((kaiming_normal if act else xavier_normal)(n_out, n_in, ks, ks))
        self.bias = None if norm else Parameter(torch.zeros(n_out))
        self.norm = BatchNorm(n_out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        "Convolve, normalise, activate."
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x, inplace=True) if self.act else x


class Linear(Module):
    "A matrix product and a bias: (..., n_in) float -> (..., n_out)."

    def __init__(self, n_in: int, n_out: int) -> None:
        self.weight, self.bias = Parameter(xavier_normal(n_out, n_in)), Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        "x @ weight.T + bias."
        return F.linear(x, self.weight, self.bias)


class AdaptivePool(Module):
    "The mean of each channel over the picture, whatever its size: (n, c, h, w) -> (n, c)."

    def forward(self, x: Tensor) -> Tensor:
        "Average, and drop the two picture dimensions."
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
