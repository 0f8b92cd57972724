"""ResNet with the bag of tricks of He et al., 2019 (https://arxiv.org/abs/1812.01187).

A stem of three 3x3 convolutions, blocks that start as their shortcuts, shortcuts that halve by an average; and, where
asked for, blur pooling, squeeze-and-excitation, another activation and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from learner.dropout import Dropout
from learner.layers import AdaptivePool, AvgPool, BlurPool, ConvLayer, Linear, MaxPool, activated, known_activation
from learner.module import Module, Sequential

STEM = (32, 32, 64)


class SqueezeExcitation(Module):
    """Scale each channel by a number in (0, 1) that all channels' means decide: (n, c, h, w) float, same shape out.

    Hu et al., 2018 (https://arxiv.org/abs/1709.01507), by way of c / `reduction` hidden numbers.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        hidden = max(channels // reduction, 1)
        self.squeeze, self.reduce, self.expand = AdaptivePool(), Linear(channels, hidden), Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        "Squeeze, excite, scale."
        scale = self.expand(F.relu(self.reduce(self.squeeze(x)))).sigmoid()
        return x * scale[:, :, None, None]


def conv_down(n_in: int, n_out: int, stride: int, act: str, blur: bool) -> Module:
    "A 3x3 ConvLayer with BatchNorm; with `blur`, one that halves does so by a BlurPool behind it (Zhang, 2019)."
    if blur and stride > 1:
        return Sequential(ConvLayer(n_in, n_out, act=act, norm=True), BlurPool())
    return ConvLayer(n_in, n_out, stride, act=act, norm=True)


class ResBlock(Module):
    """An activation of the sum of a branch of convolutions and a shortcut: He et al. (https://arxiv.org/abs/1512.03385).

    (n, n_in, h, w) float -> (n, n_out, ceil(h/stride), ceil(w/stride)), stride 1 or 2. The branch is 3x3, 3x3, or as a
    `bottleneck` 1x1, 3x3, 1x1 with a quarter of the channels, and halves in its first 3x3. It ends in a BatchNorm
    whose weight starts at zero, so that the block starts as its shortcut; the shortcut halves by an average, then
    changes the number of channels by a 1x1 convolution: He et al., 2019 (https://arxiv.org/abs/1812.01187). With
    `blur` all halving is by BlurPool; with `excite` the branch ends in a SqueezeExcitation.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int = 1, bottleneck: bool = False, act: str = "relu", blur: bool = False,
        excite: bool = False,
    ) -> None:  # fmt: skip
        inner = n_out // 4 if bottleneck else n_out
        last = ConvLayer(inner, n_out, ks=1 if bottleneck else 3, act=False, norm=True)
        last.norm.weight.data.zero_()  # type: ignore[union-attr]
        layers: list[Module] = [conv_down(inner if bottleneck else n_in, inner, stride, act, blur), last]
        if bottleneck:
            layers.insert(0, ConvLayer(n_in, inner, ks=1, act=act, norm=True))
        if excite:
            layers.append(SqueezeExcitation(n_out))
        self.branch = Sequential(*layers)
        shortcut: list[Module] = [BlurPool() if blur else AvgPool()] if stride > 1 else []
        if n_in != n_out:
            shortcut.append(ConvLayer(n_in, n_out, ks=1, act=False, norm=True))
        self.shortcut, self.act = Sequential(*shortcut), known_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        "Branch plus shortcut, activated."
        return activated(self.branch(x) + self.shortcut(x), self.act)


def xresnet(
    n_in: int, n_out: int, depths: tuple[int, ...], bottleneck: bool = False, act: str = "relu", blur: bool = False,
    excite: bool = False, dropout: float = 0.0,
) -> Sequential:  # fmt: skip
    """Stem, stages of `depths` blocks, mean, Dropout of `dropout`, linear layer: (n, n_in, h, w) float -> (n, n_out).

    `act` is a name of layers.ACTIVATIONS; `blur` halves by BlurPool; `excite` puts SqueezeExcitation into each block.
    """
    stem = [conv_down(n_in, STEM[0], 2, act, blur)]
    stem += [ConvLayer(a, b, act=act, norm=True) for a, b in pairwise(STEM)]
    pool = [MaxPool(stride=1), BlurPool()] if blur else [MaxPool()]
    widths = [STEM[-1], *(64 * (4 if bottleneck else 1) << number for number in range(len(depths)))]

    def stage(number: int) -> Iterator[Module]:
        for block in range(depths[number]):
            first = block == 0
            a, b = widths[number if first else number + 1], widths[number + 1]
            yield ResBlock(a, b, 2 if first and number else 1, bottleneck, act, blur, excite)

    stages = [Sequential(*stage(number)) for number in range(len(depths))]
    return Sequential(*stem, *pool, *stages, AdaptivePool(), Dropout(dropout), Linear(widths[-1], n_out))


def xresnet18(n_in: int = 3, n_out: int = 1000, **options: bool | str | float) -> Sequential:
    "As deep as resnet18; `options` are those of `xresnet`."
    return xresnet(n_in, n_out, (2, 2, 2, 2), **options)  # type: ignore[arg-type]


def xresnet34(n_in: int = 3, n_out: int = 1000, **options: bool | str | float) -> Sequential:
    "As deep as resnet34; `options` are those of `xresnet`."
    return xresnet(n_in, n_out, (3, 4, 6, 3), **options)  # type: ignore[arg-type]


def xresnet50(n_in: int = 3, n_out: int = 1000, **options: bool | str | float) -> Sequential:
    "As deep as resnet50; `options` are those of `xresnet`."
    return xresnet(n_in, n_out, (3, 4, 6, 3), bottleneck=True, **options)  # type: ignore[arg-type]
