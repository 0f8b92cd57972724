"What the peers of the chaos benchmark share: steps on tensors in memory, each noted in a file, a checkpoint an epoch."

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_models import simple_cnn

RANKS, STEPS, EPOCHS, BATCH, SIZE, LR = 3, 30, 5, 96, 64, 0.01  # BATCH: the global one; STEPS: of an epoch


def model() -> nn.Module:
    "simple_cnn, in the memory format that torch recommends for convolutions."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return simple_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    "SGD with momentum."
    return torch.optim.SGD(net.parameters(), LR, 0.9)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, folder: str, rank: int, first: int, save: Callable[[int], None]
) -> None:
    "From epoch `first` on; each step is a line in the folder's file of the rank, and `save(epoch)` comes after each."
    x = torch.randn(BATCH // RANKS, SIZE, SIZE, 3).permute(0, 3, 1, 2)
    y = torch.randint(10, (len(x),))
    with open(Path(folder, f"steps_{rank}"), "a", buffering=1) as diary:
        for epoch in range(first, EPOCHS):
            for number in range(STEPS):
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                diary.write(f"{time.time()} {os.getpid()} {epoch * STEPS + number}\n")
            save(epoch)
