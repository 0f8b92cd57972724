"simple_cnn and resnet18 in torch.nn, for the peers: the same layers with as many parameters as ours."

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def simple_cnn(n_out: int = 10) -> nn.Module:
    "As learner/models.py's: 0.1 M parameters."
    convs: list[nn.Module] = []
    for n_in, width in pairwise([3, 16, 32, 64, 128]):
        convs += [nn.Conv2d(n_in, width, 3, 2, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_out))


class Block(nn.Module):
    "Two convolutions and a shortcut."

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        change = [nn.Conv2d(n_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.downsample = nn.Sequential(*change if stride > 1 or n_in != width else [])

    def forward(self, x: Tensor) -> Tensor:
        "Branch plus shortcut."
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


def resnet18(n_out: int = 10) -> nn.Module:
    "As torchvision's: 11.2 M parameters."
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    for n_in, width in pairwise([64, 64, 128, 256, 512]):
        blocks += [Block(n_in, width, 1 if width == 64 else 2), Block(width, width, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_out))


def conv_bn(n_in: int, width: int, ks: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    "Convolution, BatchNorm, and maybe a ReLU."
    layers = [nn.Conv2d(n_in, width, ks, stride, ks // 2, bias=False), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Bottleneck(nn.Module):
    "1x1, 3x3, 1x1 and a shortcut that halves by an average."

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.branch = nn.Sequential(
            conv_bn(n_in, inner, 1), conv_bn(inner, inner, 3, stride), conv_bn(inner, width, 1, act=False)
        )
        halve = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)] if stride > 1 else []
        change = [conv_bn(n_in, width, 1, act=False)] if n_in != width else []
        self.shortcut = nn.Sequential(*halve, *change)

    def forward(self, x: Tensor) -> Tensor:
        "Branch plus shortcut."
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def xresnet50(n_out: int = 10) -> nn.Module:
    "As learner/xresnet.py's: 23.5 M parameters."
    stem = [conv_bn(3, 32, 3, 2), conv_bn(32, 32, 3), conv_bn(32, 64, 3), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    for stage, (n_in, width, depth) in enumerate(zip((64, 256, 512, 1024), (256, 512, 1024, 2048), (3, 4, 6, 3))):
        blocks.append(Bottleneck(n_in, width, 2 if stage else 1))
        blocks += [Bottleneck(width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, n_out))
