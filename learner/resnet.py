"""ResNet exactly as torchvision builds and names it, so that its weights and timm's load into ours.

He et al., 2015 (https://arxiv.org/abs/1512.03385); a bottleneck halves in its 3x3 convolution, as in torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from learner.batchnorm import BatchNorm
from learner.errors import UserError, shown
from learner.layers import AdaptivePool, Conv, Linear, MaxPool
from learner.module import Module, Sequential
from learner.reading import opened


class BasicBlock(Module):
    "Two 3x3 convolutions and a shortcut: (n, n_in, h, w) float -> (n, width, ceil(h/stride), ceil(w/stride))."

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        self.conv1, self.bn1 = Conv(n_in, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = Conv(width, width, 3), BatchNorm(width)
        self.downsample = downsample(n_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        "Branch plus shortcut, through a ReLU."
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class Bottleneck(Module):
    "1x1, 3x3 and 1x1 convolutions and a shortcut: as BasicBlock, but `width` * 4 channels come out."

    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        n_out = width * self.expansion
        self.conv1, self.bn1 = Conv(n_in, width, 1), BatchNorm(width)
        self.conv2, self.bn2 = Conv(width, width, 3, stride), BatchNorm(width)
        self.conv3, self.bn3 = Conv(width, n_out, 1), BatchNorm(n_out)
        self.downsample = downsample(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        "Branch plus shortcut, through a ReLU."
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


def downsample(n_in: int, n_out: int, stride: int) -> Sequential:
    "The shortcut: empty where a block changes no shape, else a 1x1 convolution and BatchNorm."
    if stride == 1 and n_in == n_out:
        return Sequential()
    return Sequential(Conv(n_in, n_out, 1, stride), BatchNorm(n_out))


class ResNet(Module):
    """A stem, four layers of `depths` blocks each, a mean and a linear layer: (n, n_in, h, w) float -> (n, n_out).

    The stem and the last three layers halve the picture, the stem twice; from 32 x 32 on, any size will do.
    """

    layer1: Sequential
    layer2: Sequential
    layer3: Sequential
    layer4: Sequential

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], n_in: int, n_out: int) -> None:
        self.conv1, self.bn1, self.maxpool = Conv(n_in, 64, 7, 2), BatchNorm(64), MaxPool()
        channels = 64
        for number, depth in enumerate(depths):
            width = 64 << number
            strides = [2 if number else 1] + [1] * (depth - 1)
            inputs = [channels] + [width * block.expansion] * (depth - 1)
            setattr(self, f"layer{number + 1}", Sequential(*(block(a, width, s) for a, s in zip(inputs, strides))))
            channels = width * block.expansion
        self.avgpool, self.fc = AdaptivePool(), Linear(channels, n_out)

    def forward(self, x: Tensor) -> Tensor:
        "Pictures to logits."
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(self.avgpool(x))


def resnet18(n_in: int = 3, n_out: int = 1000) -> ResNet:
    "torchvision's resnet18: 11.7 M parameters for 1000 classes."
    return ResNet(BasicBlock, (2, 2, 2, 2), n_in, n_out)


def resnet34(n_in: int = 3, n_out: int = 1000) -> ResNet:
    "torchvision's resnet34: 21.8 M parameters for 1000 classes."
    return ResNet(BasicBlock, (3, 4, 6, 3), n_in, n_out)


def resnet50(n_in: int = 3, n_out: int = 1000) -> ResNet:
    "torchvision's resnet50: 25.6 M parameters for 1000 classes."
    return ResNet(Bottleneck, (3, 4, 6, 3), n_in, n_out)


def read_tensors(file: Path | str) -> dict[str, Tensor]:
    "The tensors of a safetensors file; UserError for any other, such as a pickle (.pt, .pth), which could run code."
    try:
        with opened(file):
            return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shown(str(error))
        raise UserError(
            f"{file} can't be read as safetensors: {reason}; where it is from torch.save and you trust it, convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        ) from error


def load_torchvision(model: Module, state: Mapping[str, Tensor] | Path | str, head: bool = True) -> Module:
    """Copy weights of torchvision's or timm's ResNet of the same depth into `model`, and return it.

    `state` is a state_dict, or a safetensors file of one. The mapping: each name is the same here as there, and
    `*.num_batches_tracked` (torch's counters of batches, which our BatchNorm has no use for) is left out. Without
    `head` the last layer, `fc`, keeps our weights: for other classes than theirs. Raises UserError that lists every
    name that is missing, unexpected or of another shape.
    """
    tensors = read_tensors(state) if isinstance(state, Path | str) else state
    wanted = {name: t for name, t in tensors.items() if not name.endswith(".num_batches_tracked")}
    if not head:
        own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fc.")}
        wanted |= own
    return model.load_state_dict(wanted)
