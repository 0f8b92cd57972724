"The blocks of the improved ResNet: convolutions with a shortcut around them, and squeeze-and-excitation."

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from learner.layers import AdaptivePool, AvgPool, BlurPool, ConvLayer, Linear, activated, known_activation
from learner.module import Module, Sequential


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


def conv_down(n_in: int, n_out: int, stride: int, ks: int = 3, act: bool | str = True, blur: bool = False) -> Module:
    "A ConvLayer with BatchNorm; with `blur`, one that halves does so by a BlurPool behind it (Zhang, 2019)."
    if blur and stride > 1:
        return Sequential(ConvLayer(n_in, n_out, ks=ks, act=act, norm=True), BlurPool())
    return ConvLayer(n_in, n_out, stride, ks, act, norm=True)


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
        layers: list[Module] = [conv_down(inner if bottleneck else n_in, inner, stride, act=act, blur=blur), last]
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
