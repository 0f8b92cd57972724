"""ResNet with the bag of tricks of He et al., 2019 (https://arxiv.org/abs/1812.01187).

A stem of three 3x3 convolutions, blocks that start as their shortcuts, shortcuts that halve by an average; and, where
asked for, blur pooling, squeeze-and-excitation, another activation and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from learner.blocks import ResBlock, conv_down
from learner.dropout import Dropout
from learner.layers import AdaptivePool, BlurPool, ConvLayer, Linear, MaxPool
from learner.module import Module, Sequential

STEM = (32, 32, 64)


def xresnet(
    n_in: int, n_out: int, depths: tuple[int, ...], bottleneck: bool = False, act: str = "relu", blur: bool = False,
    excite: bool = False, dropout: float = 0.0,
) -> Sequential:  # fmt: skip
    """Stem, stages of `depths` blocks, mean, Dropout of `dropout`, linear layer: (n, n_in, h, w) float -> (n, n_out).

    `act` is a name of layers.ACTIVATIONS; `blur` halves by BlurPool; `excite` puts SqueezeExcitation into each block.
    """
    stem = [conv_down(n_in, STEM[0], 2, act=act, blur=blur)]
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
